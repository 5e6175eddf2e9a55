"""Fuzz kinds of files: `python -m tests.fuzz [KIND ...] --mutants 5000`; exit with 1 if a mutant broke the promise."""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

from tests.fuzz.harness import fuzz
from tests.fuzz.kinds import KINDS, make_project


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--mutants", type=int, default=200, help="of each kind; fewer of those that take long")
    parser.add_argument("--first", type=int, default=0, help="seed of the first mutant; -1 chooses it at random")
    parser.add_argument("--show", type=int, default=1500)
    options = parser.parse_args()
    first_seed = options.first if options.first >= 0 else random.randrange(10**9)
    finding_count = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MHMOE_HOME"] = f"{folder}/home"
        project, workspace = Path(folder) / "seed", Path(folder) / "work"
        project.mkdir()
        workspace.mkdir()
        make_project(project)
        for name in options.kinds or KINDS:
            seeds = range(first_seed, first_seed + options.mutants // KINDS[name].rarity)
            figures = fuzz(KINDS[name], project, workspace, seeds)
            print(
                f"{name}: {figures.refused_count} of {figures.mutants} refused, "
                f"{figures.longest_seconds:.2f} s and {figures.largest_growth / 1e6:.0f} MB at most, "
                f"{len(figures.findings)} findings",
                flush=True,
            )
            finding_count += len(figures.findings)
            for finding in figures.findings:
                print(f"--- {name} {finding.seed} {finding.file}\n{finding.failure[-options.show :]}", flush=True)
    sys.exit(int(finding_count > 0))


if __name__ == "__main__":
    main()
