"""Recorder of where this process imports the compared packages from; Python imports this module when it starts."""

import json
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGES = os.environ.get("EQUAL_PACKAGES", "").split()
RECORD = os.environ.get("EQUAL_IMPORTS", "")


class ImportRecorder:
    """Import finder that finds no module, and records the file of each compared package when it is imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Record the file that the import of a compared package will find; return None, so other finders find it."""
        if name in PACKAGES:
            spec = PathFinder.find_spec(name)
            line = {"package": name, "origin": spec and spec.origin, "command": sys.orig_argv}
            with open(RECORD, "a") as record:  # noqa: PTH123 - pathlib takes a while to import
                record.write(json.dumps(line) + "\n")
        return None


if RECORD:
    sys.meta_path.insert(0, ImportRecorder)  # type: ignore[arg-type]
