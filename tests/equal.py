"""Compare this working tree with a commit: everything that a user sees must be equal, to the last bit.

    python -m tests.equal COMMIT

Both trees do the same in the same environment, one after the other at the same paths, so that paths and digests of them
are equal too: they prepare text, train nine models in two precisions, export, evaluate and serve some of them, and
answer commands and mistakes. They are driven by their command line and seen in their files; nothing of them is
imported here. One line for each compared thing says whether it is equal, or where it first differs.

What was seen of a commit is stored, and read when it is compared with again in an equal environment.
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
"""Parts of the command lines of commands, of jobs of runs, and of Ray's own workers: each side must have had some."""
# Short, since paths of Unix sockets may not be long; and always the same, since prepared data, and checkpoints by its
# digest, know where they lie.
WORK = Path("/tmp" if len(tempfile.gettempdir()) > 15 else tempfile.gettempdir()) / f"equal-{os.getuid()}"

Tree = Callable[[Path], AbstractContextManager[Path]]
"""Puts a tree into a folder for a while."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.equal", description="Compare this working tree with a commit.")
    parser.add_argument("commit", help="what to compare with")
    parser.add_argument("--level", choices=LEVELS, default=best_level(), help="CPU level that both sides compute at")
    parser.add_argument("--models", default=",".join(specs.MODELS), help="only these, by commas")
    parser.add_argument(
        "--anew", action="store_true", help="observe the commit again even if its observations are stored"
    )
    parser.add_argument("--keep", action="store_true", help="leave both sides' files for a look")
    options = parser.parse_args()
    models = options.models.split(",")
    if unknown := set(models) - specs.MODELS.keys():
        parser.error(f"unknown models {', '.join(unknown)}; there are {', '.join(specs.MODELS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # clusters are taken down on the way
    commit = trees.commit_of(options.commit)
    store = Store(commit, options.level, models)
    look = partial(_observe, level=options.level, models=models, port=_free_port())
    try:
        with _locked_work_folder(options.keep):
            base = None if options.anew else store.read()
            if base is None:
                base = look("base", partial(trees.worktree, commit))
                store.write(base)
            our_observations = look("here", trees.working_copy)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _compared(base, our_observations)


@contextmanager
def _locked_work_folder(keep: bool) -> Iterator[None]:
    """Make the folder of both sides, of which there is one; remove it in the end.

    Raises:
        CommandError: another comparison uses it.
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
    """Return all that is seen of one tree. Its folder is called the same for both; in the end it gets the side's name.

    Raises:
        CommandError: a command fails that must not, or a process ran other code than this tree's.
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
    # As it is read again when it was stored.
    read: Observations = json.loads(json.dumps(observations))
    return read


def _compared(base: Observations, our_observations: Observations) -> int:
    """Print a line for each thing; return how the process is to end."""
    names, different = list(dict.fromkeys([*base, *our_observations])), 0
    for name in names:
        if name not in base or name not in our_observations:
            difference: str | None = f"it is there only {'here' if name in our_observations else 'in the commit'}"
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
