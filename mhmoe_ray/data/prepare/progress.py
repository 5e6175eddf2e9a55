"""How far a preparation is: a file beside its parts, which any command can read."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from mhmoe_ray.storage import replace_file

FILE = "progress.json"
EVERY_SECONDS = 1.0

Stage = Literal["tokenizer", "tokenising", "packing", "finishing"]


class PreparationProgress(BaseModel):
    stage: Stage
    done: int
    """Of tokenising bytes as they are stored, of packing shards."""
    total: int
    documents: int
    tokens: int
    found_tokens: int
    """Of these, tokens that an earlier attempt left."""
    bytes_per_s: float
    """Stored bytes tokenised by this attempt."""
    seconds_left: float | None
    """Of tokenising; None before it can be told."""


@dataclass
class Report:
    """Keeps the file up to date."""

    folder: Path
    total_bytes: int
    stage: Stage = "tokenizer"
    done_bytes: int = 0
    found_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    found_tokens: int = 0
    shards: int = 0
    total_shards: int = 0
    _began: float = field(default_factory=time.monotonic)
    _written: float = 0.0

    def enter(self, stage: Stage) -> None:
        self.stage, self._began = stage, time.monotonic()
        self.write()

    def refresh(self) -> None:
        if time.monotonic() - self._written >= EVERY_SECONDS:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        seconds = max(self._written - self._began, 1e-3)
        made = self.done_bytes - self.found_bytes
        packing = self.stage == "packing"
        progress = PreparationProgress(
            stage=self.stage,
            done=self.shards if packing else self.done_bytes,
            total=self.total_shards if packing else self.total_bytes,
            documents=self.documents,
            tokens=self.tokens,
            found_tokens=self.found_tokens,
            bytes_per_s=made / seconds if self.stage == "tokenising" else 0.0,
            seconds_left=(self.total_bytes - self.done_bytes) * seconds / made
            if made and self.stage == "tokenising"
            else None,
        )
        replace_file(self.folder / FILE, progress.model_dump_json().encode())


def read_progress(folder: Path) -> PreparationProgress | None:
    """None where nothing is being prepared."""
    try:
        return PreparationProgress.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None
