"""Try the lowest, the tested and the newest versions of Python and of our dependencies: `python -m tests.versions`.

Each corner of the range gets an environment in .venv-versions. The quickstart runs with the package and the two extras
that it needs, and then the fast tests run with all extras but vLLM's. The printed table is README's; the output of a
corner is in its log. It takes `uv` from the path. An interpreter that the machine lacks is not downloaded.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-versions"
QUICK = ("train.steps=60", "train.warmup_steps=10", "train.validate_every=60", "train.checkpoint_every=30")
FAST_TESTS = (
    "-n",
    "2",
    "--dist",
    "loadfile",
    "--no-loadscope-reorder",
    "--fast",
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:anyio",
)
SHOWN_PACKAGES = ("torch", "ray", "numpy", "pyarrow", "pydantic")


class Corner(NamedTuple):
    """Python's version, options with which uv chooses the versions of direct dependencies, and options of pytest."""

    python: str
    options: tuple[str, ...]
    test_options: tuple[str, ...] = ()


CORNERS = {
    # The lowest versions use newer ones of their own dependencies in ways that those have deprecated since.
    "lowest": Corner("3.11", ("--resolution", "lowest-direct"), ("-W", "ignore::DeprecationWarning")),
    "tested": Corner("3.12", ("--constraint", "constraints.txt")),
    "newest": Corner("3.13", ()),
}


def pinned_tools() -> list[str]:
    """Return the packages that only tests need, in the tested versions, whatever the corner."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[\[><=;]", requirement)[0].lower() for requirement in extras["dev"]} - {"mhmoe-ray", "triton"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] in names]


def all_extras() -> str:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return ",".join(sorted(extras.keys() - {"dev", "vllm"}))


def try_corner(name: str, corner: Corner) -> list[str]:
    """Return the cells of a corner's row: name, versions, results of the quickstart and of the tests."""
    if subprocess.run(["uv", "python", "find", "--no-python-downloads", corner.python], capture_output=True).returncode:
        return [name, corner.python, *[""] * len(SHOWN_PACKAGES), "not run: this machine lacks the interpreter", ""]
    environment = FOLDER / name
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("MHMOE_", "PYTHON", "RAY_"))}
    variables |= {"VIRTUAL_ENV": str(environment), "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    with (FOLDER / f"{name}.log").open("w") as log, tempfile.TemporaryDirectory() as folder:

        def run(*words: str, cwd: Path = ROOT) -> bool:
            print("$", *words, file=log, flush=True)
            process = subprocess.run(words, cwd=cwd, env=variables, stdout=log, stderr=subprocess.STDOUT)
            return process.returncode == 0

        def versions() -> dict[str, str]:
            freeze = subprocess.check_output(["uv", "pip", "freeze"], env=variables, text=True)
            return dict(line.split("==") for line in freeze.splitlines() if "==" in line)

        install = ("uv", "pip", "install", *corner.options)
        run("uv", "venv", "--seed", "--clear", "--python", corner.python, str(environment))
        cells, is_installed = [], run(*install, "-e", ".[report,sample]")
        if is_installed:
            cells += [versions()[package] for package in SHOWN_PACKAGES]
            shutil.copytree(ROOT / "jobs", Path(folder) / "jobs")
            variables["MHMOE_HOME"] = f"{folder}/home"
            cells.append("passes" if run("python", "jobs/quickstart.py", *QUICK, cwd=Path(folder)) else "fails")
            # The other extras may need newer versions than the package alone.
            is_installed = run(*install, "-e", f".[{all_extras()}]", *pinned_tools())
        if not is_installed:
            return [name, corner.python, *cells, *["cannot be installed"] * (len(SHOWN_PACKAGES) + 2 - len(cells))]
        run("python", "-m", "pytest", *FAST_TESTS, *corner.test_options)
        python = subprocess.check_output(["python", "-V"], env=variables, text=True).split()[1]
    summary = (FOLDER / f"{name}.log").read_text().splitlines()[-1]
    return [name, python, *cells, ", ".join(re.findall(r"\d+ (?:passed|failed|errors?)", summary)) or summary]


def main() -> int:
    """Try the named corners, or all; print the table, and return 1 unless everything that could run passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corners", nargs="*", choices=[*CORNERS, []], help="corners to try; by default all")
    names = parser.parse_args().corners or list(CORNERS)
    FOLDER.mkdir(exist_ok=True)
    rows = [try_corner(name, CORNERS[name]) for name in names]
    for row in [["versions", "Python", *SHOWN_PACKAGES, "quickstart", "fast tests"], ["---"] * 9, *rows]:
        print(f"| {' | '.join(row)} |")
    return any(re.search("fail|error|cannot", cell) is not None for row in rows for cell in row)


if __name__ == "__main__":
    sys.exit(main())
