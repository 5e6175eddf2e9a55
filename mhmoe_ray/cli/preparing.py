"""Showing how far a preparation of data is."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress as Bar
from rich.progress import TaskID

from mhmoe_ray.cli.common import in_bytes, note

if TYPE_CHECKING:
    from mhmoe_ray.data.prepare.work import PreparationProgress


EVERY_SECONDS = 10.0
"""Between lines, where there is no terminal to keep one line in motion."""


class PreparingView:
    """A task of a bar on a terminal, lines elsewhere.

    Args:
        work: folder of the preparation.
        bar: may have other tasks.
    """

    def __init__(self, work: Path, bar: Bar) -> None:
        self._work, self._bar = work, bar
        self._task: TaskID | None = None
        self._told, self._stage = 0.0, ""

    def refresh(self) -> None:
        from mhmoe_ray.data.prepare.work import read_progress

        progress = read_progress(self._work)
        if progress is None:
            self.close()
            return
        if self._task is None:
            self._task = self._bar.add_task("", figures="")
        stage = progress.stage if progress.stage != "tokenizer" else "training the tokenizer"
        percent = round(100 * progress.done / progress.total) if progress.total else 0
        self._bar.update(self._task, description=stage, completed=percent, total=100, figures=text(progress))
        due = progress.stage != self._stage or time.monotonic() - self._told > EVERY_SECONDS
        if due and not note.is_terminal:
            self._told, self._stage = time.monotonic(), progress.stage
            note.print(f"prepare: {stage} {text(progress)}".rstrip(), soft_wrap=True)

    def close(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


def text(progress: "PreparationProgress") -> str:
    """Its figures in one line."""
    if progress.stage == "packing":
        return f"{progress.done:,} of {progress.total:,} shards"
    if progress.stage != "tokenising":
        return ""
    parts = [
        f"{in_bytes(progress.done)} of {in_bytes(progress.total)}",
        f"{progress.documents:,} documents",
        f"{progress.tokens:,} tokens",
    ]
    if progress.found_tokens:
        parts.append(f"{progress.found_tokens:,} from before")
    if progress.seconds_left is not None:
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        parts += [f"{progress.bytes_per_s / 1e6:.2f} MB/s", f"{minutes}:{seconds:02d} left"]
    return ", ".join(parts)
