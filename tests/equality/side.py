"""A tree at work: its environment, its commands and its cluster."""

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
"""Number of seconds within which a command must end, also the sweep of all models."""
SITE = Path(__file__).parent / "site"

LAUNCHER = """\
import sys

from {module} import {function}

if __name__ == "__main__":
    sys.exit({function}())
"""


class CommandError(Exception):
    """Raised where a command did not end as it must for the comparison to go on."""


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def best_level() -> str:
    """Return the highest of the CPU levels that this machine has."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512" if "avx512f" in flags and "avx512bw" in flags else "avx2"


class Side:
    def __init__(self, folder: Path, level: str) -> None:
        """Prepare the folder of a side, in which its tree already lies.

        Args:
            folder: The side's own folder. Its path is the same for both sides, one after the other, so that absolute
                paths in specs, manifests and digests are equal too.
            level: A key of `LEVELS`.
        """
        self.folder, self.tree, self.project = folder, folder / "tree", folder / "project"
        self.imports = folder / "imports.jsonl"
        self.project.mkdir()
        (folder / "home").mkdir()
        (folder / "bin").mkdir()
        self._write_launcher()
        self._environment = self._made_environment(level)

    def _write_launcher(self) -> None:
        """Write the script that pip would install as `mhmoe`; its module is the one that the tree's own pyproject.toml
        names."""
        scripts = tomllib.loads((self.tree / "pyproject.toml").read_text())["project"]["scripts"]
        module, _, function = scripts["mhmoe"].partition(":")
        (self.folder / "bin" / "mhmoe").write_text(LAUNCHER.format(module=module, function=function))

    def _made_environment(self, level: str) -> dict[str, str]:
        foreign_prefixes = ("RAY_", "MHMOE_", "PYTHON", "OMP_", "MKL_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign_prefixes)}
        packages = [path.parent for top in (self.tree, self.tree / "kernels") for path in top.glob("*/__init__.py")]
        aten, onednn, mkl = LEVELS[level]
        return {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            # Before the editable install, whose finder comes after all folders of the path.
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
            # Nothing scales here, and what asks whether anything should takes a part of a core.
            "AUTOSCALER_UPDATE_INTERVAL_S": "60",
        }

    def ask(self, *args: str, stdin: str = "") -> Answer:
        """Run `mhmoe` with these arguments in the project folder."""
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
        """Return the standard output of a command that must succeed.

        Raises:
            CommandError: The command fails.
        """
        answer = self.ask(*args)
        if answer.code:
            raise CommandError(f"mhmoe {' '.join(args)} ended with {answer.code}\n{answer.out}{answer.err}")
        return answer.out

    def json(self, *args: str) -> Any:
        """Return the JSON that a command prints.

        Raises:
            CommandError: The command fails.
        """
        return json.loads(self.text(*args))

    @contextmanager
    def cluster(self) -> Iterator[None]:
        """Start the side's own Ray cluster, and stop it at the end whatever happens."""
        try:
            # Somebody may take a port between its choice and Ray's start; how that ends is not what is compared.
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
        """Return the evidence that a process did not run this side's code, one line each.

        Args:
            parts: Texts for each of which there must be a process with that text in its command line.
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
