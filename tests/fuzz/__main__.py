"""Fuzz kinds of files: `python -m tests.fuzz [KIND ...] --mutants 5000`; print what broke the promise."""

import argparse
import os
import tempfile
from pathlib import Path

from tests.fuzz.harness import fuzz
from tests.fuzz.kinds import KINDS, make_project


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--show", type=int, default=1500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MHMOE_HOME"] = f"{folder}/home"
        project, workspace = Path(folder) / "seed", Path(folder) / "work"
        project.mkdir()
        workspace.mkdir()
        make_project(project)
        for name in options.kinds or KINDS:
            figures = fuzz(KINDS[name], project, workspace, range(options.first, options.first + options.mutants))
            print(
                f"{name}: {figures.refused_count} of {figures.mutants} refused, "
                f"{figures.longest_seconds:.2f} s at most, {len(figures.findings)} findings",
                flush=True,
            )
            for finding in figures.findings:
                print(f"--- {name} {finding.seed} {finding.file}\n{finding.failure[-options.show :]}", flush=True)


if __name__ == "__main__":
    main()
