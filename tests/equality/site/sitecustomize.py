"""Record from where this process imports the packages under comparison; Python imports this module at its start."""

import json
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGES = os.environ.get("EQUAL_PACKAGES", "").split()
RECORD = os.environ.get("EQUAL_IMPORTS", "")


class ImportRecorder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find nothing, so that the import goes on as usual, and record what it will find on the path."""
        if name in PACKAGES:
            spec = PathFinder.find_spec(name)
            line = {"package": name, "origin": spec and spec.origin, "command": sys.orig_argv}
            with open(RECORD, "a") as record:  # noqa: PTH123 - pathlib takes a while to import
                record.write(json.dumps(line) + "\n")
        return None


if RECORD:
    sys.meta_path.insert(0, ImportRecorder)  # type: ignore[arg-type]
