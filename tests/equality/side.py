"""A side of the comparison: a tree with its project folder, environment, commands and cluster."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

LEVELS = {"avx2": ("avx2", "AVX2", "AVX2"), "avx512": ("avx512", "AVX512_CORE", "AVX512")}
"""Names that torch, oneDNN and MKL have for each CPU level."""
LOGICAL_CPUS = 12
"""Number of logical CPUs that the sweep asks for; with more, Ray starts more processes that have little to do."""
STARTS = 3
"""Number of attempts to start a cluster."""
SECONDS = 1500
"""Timeout of each command in seconds; the longest is the sweep of all models."""
SITE = Path(__file__).parent / "site"

LAUNCHER = """\
import sys

from {module} import {function}

if __name__ == "__main__":
    sys.exit({function}())
"""


class CommandError(Exception):
    """Error that ends the comparison, such as the failure of a command whose result it needs."""


class Answer(NamedTuple):
    """The exit code, the standard output and the standard error of a command."""

    code: int
    out: str
    err: str


def best_level() -> str:
    """Return the highest key of `LEVELS` that this machine supports, or `avx2` if that is unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512" if "avx512f" in flags and "avx512bw" in flags else "avx2"


class Side:
    """A tree whose commands run in a project folder, with an environment and a cluster of their own."""

    def __init__(self, folder: Path, level: str) -> None:
        """Create the project folder, the MHMOE_HOME and the command `mhmoe` of a side.

        Args:
            folder: The side's own folder, which has the tree in `tree`. Both sides use the same path, one after the
                other, so that absolute paths in specs and manifests, and digests of them, are equal too.
            level: CPU level that its processes compute at, a key of `LEVELS`.
        """
        self.folder, self.tree, self.project = folder, folder / "tree", folder / "project"
        self.imports = folder / "imports.jsonl"
        self.project.mkdir()
        (folder / "home").mkdir()
        (folder / "bin").mkdir()
        self._write_launcher()
        self._environment = self._build_environment(level)

    def _write_launcher(self) -> None:
        """Write the script that pip would install as `mhmoe`; it calls the function that the tree's pyproject.toml
        names."""
        scripts = tomllib.loads((self.tree / "pyproject.toml").read_text())["project"]["scripts"]
        module, _, function = scripts["mhmoe"].partition(":")
        (self.folder / "bin" / "mhmoe").write_text(LAUNCHER.format(module=module, function=function))

    def _build_environment(self, level: str) -> dict[str, str]:
        """Return the environment of commands: without the user's settings, and with the side's tree on PYTHONPATH."""
        foreign_prefixes = ("RAY_", "MHMOE_", "PYTHON", "OMP_", "MKL_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign_prefixes)}
        packages = [path.parent for top in (self.tree, self.tree / "kernels") for path in top.glob("*/__init__.py")]
        aten, onednn, mkl = LEVELS[level]
        return {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            # Python searches this path before the editable installation of the project, so it imports the side's tree.
            "PYTHONPATH": os.pathsep.join(map(str, (SITE, self.tree, self.tree / "kernels"))),
            "PYTHONHASHSEED": "0",
            "EQUAL_PACKAGES": " ".join(package.name for package in packages),
            "EQUAL_IMPORTS": str(self.imports),
            "MHMOE_HOME": str(self.folder / "home"),
            "MHMOE_CPU_LEVEL": level,
            "ATEN_CPU_CAPABILITY": aten,
            "ONEDNN_MAX_CPU_ISA": onednn,
            "MKL_ENABLE_INSTRUCTIONS": mkl,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            "TERM": "dumb",
            # The autoscaler runs less often, because the cluster never scales. At Ray's default of 5 s it takes part of
            # a core.
            "AUTOSCALER_UPDATE_INTERVAL_S": "60",
        }

    def ask(self, *args: str, stdin: str = "") -> Answer:
        """Run `mhmoe` with these arguments in the project folder; it may fail."""
        command = [sys.executable, str(self.folder / "bin" / "mhmoe"), *args]
        process = subprocess.run(
            command,
            cwd=self.project,
            env=self._environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        return Answer(process.returncode, process.stdout, process.stderr)

    def text(self, *args: str) -> str:
        """Run a command that must succeed, and return its standard output.

        Raises:
            CommandError: The command fails.
        """
        answer = self.ask(*args)
        if answer.code:
            raise CommandError(f"mhmoe {' '.join(args)} ended with {answer.code}\n{answer.out}{answer.err}")
        return answer.out

    def json(self, *args: str) -> Any:
        """Run a command that must succeed, and return the JSON that it prints.

        Raises:
            CommandError: The command fails.
        """
        return json.loads(self.text(*args))

    @contextmanager
    def cluster(self) -> Iterator[None]:
        """Start the side's own Ray cluster for the block, and stop it at the end, also after an error."""
        try:
            # Repeat a failed start: another process may take a port after it was chosen and before Ray binds it. Such a
            # failure is no difference between the trees.
            for attempt in range(STARTS):
                if self.ask("cluster", "up", "--cpus", str(LOGICAL_CPUS)).code == 0:
                    break
                print(f"warning: the cluster did not start, attempt {attempt + 1}", file=sys.stderr)
            self.text("cluster", "status")
            yield
        finally:
            shutdown = self.ask("cluster", "down")
            if shutdown.code:
                print(f"warning: the cluster of {self.folder} may still run: {shutdown.err}", file=sys.stderr)

    def check_imports(self, *parts: str) -> list[str]:
        """Return one line for each import of the project that was not from this side's tree; none if all is well.

        Args:
            parts: Substrings of command lines. There is also a line for each substring that is in no command line of a
                process that imported the project, because the check must have missed such processes.
        """
        lines = [json.loads(line) for line in self.imports.read_text().splitlines()]
        foreign_imports = [f"{line['command']} imported {line['package']} from {line['origin']}" for line in lines]
        foreign_imports = [
            text for text, line in zip(foreign_imports, lines, strict=True) if not self._is_ours(line["origin"])
        ]
        commands = [" ".join(line["command"]) for line in lines]
        missing_parts = [part for part in parts if not any(part in command for command in commands)]
        return [*foreign_imports, *(f"no process of {part!r} imported the project" for part in missing_parts)]

    def _is_ours(self, origin: str | None) -> bool:
        return origin is not None and Path(origin).is_relative_to(self.tree)
