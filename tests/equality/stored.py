"""Storage of a commit's observations for the next comparison with that commit."""

import hashlib
import json
import platform
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from tests.equality.trees import ROOT

FOLDER = Path(sys.prefix) / "equal"
"""Folder of the stored observations; it is in the virtual environment, so it goes when that is removed."""


class Store:
    """The file that holds the observations of one commit in one environment."""

    def __init__(self, commit: str, level: str, models: list[str]) -> None:
        """Derive the file's name from everything that the observations depend on.

        That is the arguments, the installed packages, Python, the CPU, and the code of the comparison.

        Args:
            commit: The full hash of the commit.
            level: The level of the CPU.
            models: The names of the trained models.
        """
        packages = sorted(f"{d.name}=={d.version}" for d in distributions() if d.name != "mhmoe-ray")
        sources = [ROOT / "tests" / "equal.py", *sorted((ROOT / "tests" / "equality").rglob("*.py"))]
        source_hashes = [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
        # The model of the CPU is part of the key, because libraries choose kernels by the model too, not only by the
        # level.
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
        cpu = next((line for line in lines if line.startswith("model name")), lines[0])
        key = json.dumps([commit, level, models, packages, sys.version, cpu, source_hashes])
        self._file = FOLDER / f"{commit[:12]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"

    def read(self) -> dict[str, Any] | None:
        """Return the stored observations, and say so on standard error; return None if there are none."""
        if not self._file.exists():
            return None
        print(f"base: taken from {self._file}; --anew observes the commit again", file=sys.stderr)
        stored: dict[str, Any] = json.loads(self._file.read_text())
        return stored

    def write(self, observations: dict[str, Any]) -> None:
        """Store the observations."""
        FOLDER.mkdir(exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(observations))
        partial.rename(self._file)
