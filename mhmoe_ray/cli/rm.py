"""`mhmoe rm`: remove runs."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli import complete
from mhmoe_ray.cli.common import ForceOption, StorageOption, note, out
from mhmoe_ray.cli.complete import STORAGE
from mhmoe_ray.cli.launch import ended

if TYPE_CHECKING:
    from mhmoe_ray.runs.directory import RunDir


ASK_SECONDS = 60.0
"""For a dashboard that is busy: what is served would be taken away from its replicas."""


def rm(
    runs: Annotated[list[str], typer.Argument(help="Ids, beginnings of ids, or paths.", autocompletion=complete.runs)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: ForceOption = False,
    storage: StorageOption = STORAGE,
) -> None:
    """Remove runs that are over or lost their cluster, with their checkpoints. There is no way back.

    For example `mhmoe rm tiny-3f tiny-9a`.
    """
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs.directory import find_run
    from mhmoe_ray.storage import remove_tree

    found = [find_run(name, storage) for name in dict.fromkeys(runs)]
    for run in found:
        _check(run, force)
    names = ", ".join(run.id for run in found)
    if not yes:
        if not sys.stdin.isatty():
            raise RunError(f"runs {names}", "nobody is there to be asked", "give --yes if they are to be removed")
        if not typer.confirm(f"remove {names}, with all checkpoints?", err=True):
            note.print("nothing was removed")
            return
        for run in found:  # to answer may have taken long
            _check(run, force)
    for run in found:
        remove_tree(run.path)
        out.print(f"removed {run.id}")


def _check(run: "RunDir", force: bool) -> None:
    """Raises:
    RunError: it runs, may still run, or is served.
    TokenError: its cluster wants a token that we do not have, so nobody can tell.
    """
    from mhmoe_ray.cluster.runs import served
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs import events

    ended(run, force)
    for where in served(run, events.events(run), ASK_SECONDS):
        if where["status"] != "unknown":
            raise RunError(
                f"run {run.id}",
                f"it is served at {where['url']}",
                f"take it away first: mhmoe serve down {where['application']}",
            )
