"""Compare this working tree with a commit: everything that a user sees must be equal, to the last bit.

    python -m tests.equal COMMIT

Both trees run the same commands in the same environment, one after the other at the same path, so that paths in files
and the digests of such files are equal too. They prepare text, train nine models in two precisions, export, evaluate
and serve some of them, and answer other commands and users' mistakes. This script drives them by their command line and
reads their files; it imports nothing of them. For each observation it prints a line that says whether both are equal,
or where they first differ.

The observations of a commit are stored, and used when it is compared with again in an equal environment.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from tests.equality import specs, trees
from tests.equality.differences import first_difference
from tests.equality.side import LEVELS, CommandError, Side, best_level
from tests.equality.stored import Store
from tests.equality.walk import Observations, walk

EXPECTED_COMMANDS = ("bin/mhmoe", "mhmoe_ray.train.job", "default_worker.py")
"""Substrings of the command lines of `mhmoe`, of runs' jobs and of Ray's workers; each tree must start all three."""

# The path is short, because paths of Unix sockets must be. It is always the same, because prepared data record their
# path, and checkpoints record the digest of that record.
WORK = Path("/tmp" if len(tempfile.gettempdir()) > 15 else tempfile.gettempdir()) / f"equal-{os.getuid()}"

Tree = Callable[[Path], AbstractContextManager[Path]]
"""Function that returns a context manager, which puts a tree into the given folder and may remove it at the end."""


def main() -> int:
    """Compare both trees; return 0 if all is equal, 1 if something differs, and 2 if the comparison failed."""
    parser = argparse.ArgumentParser(prog="tests.equal", description="Compare this working tree with a commit.")
    parser.add_argument("commit", help="commit to compare with")
    parser.add_argument("--level", choices=LEVELS, default=best_level(), help="CPU level that both sides compute at")
    parser.add_argument(
        "--models", default=",".join(specs.MODELS), help="names of the models to train, separated by commas"
    )
    parser.add_argument(
        "--anew", action="store_true", help="observe the commit again even if its observations are stored"
    )
    parser.add_argument("--keep", action="store_true", help="keep the files of both sides")
    options = parser.parse_args()
    models = options.models.split(",")
    if unknown := set(models) - specs.MODELS.keys():
        parser.error(f"unknown models {', '.join(unknown)}; there are {', '.join(specs.MODELS)}")
    # SIGTERM raises SystemExit, so that the cluster is still stopped; by default it would end this process at once.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    commit = trees.commit_of(options.commit)
    store = Store(commit, options.level, models)
    observe_side = partial(_observe, level=options.level, models=models, port=_free_port())
    try:
        with _locked_work_folder(options.keep):
            base = None if options.anew else store.read()
            if base is None:
                base = observe_side("base", partial(trees.worktree, commit))
                store.write(base)
            our_observations = observe_side("here", trees.working_copy)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _print_comparison(base, our_observations)


@contextmanager
def _locked_work_folder(keep: bool) -> Iterator[None]:
    """Create the empty folder `WORK` for both sides and lock it during the block; at the end remove it unless `keep`.

    Raises:
        CommandError: Another comparison uses the folder, or one that was killed has left its cluster running.
    """
    with WORK.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(f"another comparison is at work in {WORK}; wait for its end") from None
        if (WORK / "side" / "home" / "cluster.json").exists():
            home = WORK / "side" / "home"
            raise CommandError(f"a comparison was killed; end its cluster: MHMOE_HOME={home} mhmoe cluster down")
        shutil.rmtree(WORK, ignore_errors=True)
        WORK.mkdir(mode=0o700)
        try:
            yield
        finally:
            if keep:
                print(f"the files of both sides are in {WORK}", file=sys.stderr)
            else:
                shutil.rmtree(WORK)


def _observe(name: str, tree: Tree, level: str, models: list[str], port: int) -> Observations:
    """Run all commands in a tree, and return the observations.

    Both sides work in a folder of the same name; at the end the folder is renamed to `name`.

    Args:
        name: The name of the side.
        tree: The function that puts the tree into a folder.
        level: The CPU level to compute at.
        models: The names of the models to train.
        port: The port to serve at.

    Raises:
        CommandError: A command failed that must succeed, or a process imported code outside this tree.
    """
    folder, start_time = WORK / "side", time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start_time:4.0f} s] {name}: {text}", file=sys.stderr, flush=True)

    folder.mkdir()
    try:
        with tree(folder / "tree"):
            side = Side(folder, level)
            observations = walk(side, models, port, say)
            if problems := side.check_imports(*EXPECTED_COMMANDS):
                raise CommandError("\n".join(problems))
    finally:
        folder.rename(WORK / name)
    say("done")
    # Stored observations have been through JSON, so these go through JSON too. Otherwise equal ones could differ, such
    # as tuples and lists.
    stored_form: Observations = json.loads(json.dumps(observations))
    return stored_form


def _print_comparison(base: Observations, our_observations: Observations) -> int:
    """Print a line for each observation: equal, or where it differs; return 1 if any differs, else 0."""
    names, different = list(dict.fromkeys([*base, *our_observations])), 0
    for name in names:
        if name not in base or name not in our_observations:
            difference: str | None = f"it exists only {'here' if name in our_observations else 'in the commit'}"
        else:
            difference = first_difference(base[name], our_observations[name])
        different += difference is not None
        print(f"equal      {name}" if difference is None else f"DIFFERENT  {name}: {difference}")
    print(f"{len(names)} things compared, {different} of them differ")
    return 1 if different else 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
