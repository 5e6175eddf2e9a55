"""`mhmoe resume`: go on with a run from its newest whole checkpoint."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli import launch
from mhmoe_ray.cli.common import STORAGE, AddressOption, DetachOption, RunArg, SetOption, StorageOption, note
from mhmoe_ray.cli.follow import follow

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.cluster.watch import Outcome
    from mhmoe_ray.runs.layout import RunDir
    from mhmoe_ray.runs.state import Attempt
    from mhmoe_ray.spec import RunSpec


ForceOption = Annotated[
    bool, typer.Option("--force", help="Also if its cluster does not answer but it wrote a moment ago.")
]
QUIET_SECONDS = 120.0  # without a line from a run whose cluster does not answer, after which it counts as dead


def resume(
    run: RunArg = None,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    storage: StorageOption = STORAGE,
    address: AddressOption = None,
    detach: DetachOption = False,
    force: ForceOption = False,
) -> None:
    """Go on with a run that stopped, failed or lost its cluster, from its newest whole checkpoint.

    It goes on where it ran before, unless an address is given. Only keys of the cluster section may change: with them
    the run goes on exactly as it would have.
    """
    from mhmoe_ray.errors import RunError, SpecError
    from mhmoe_ray.runs.layout import find_run
    from mhmoe_ray.runs.state import last_attempt
    from mhmoe_ray.spec import load_spec, parse_overrides

    found = find_run(run, storage, with_job=True)
    for keys, _ in parse_overrides(set_):
        if keys[0] != "cluster":
            why = "a resumed run must go on exactly as it would have"
            raise SpecError(f"override {'.'.join(keys)}", why, "change only cluster keys, or submit a new run")
    before = last_attempt(found)
    over = ended(found, force)
    if over and over.state == "finished":
        raise RunError(f"run {found.id}", "it is finished", "submit a new run to train longer")
    spec = load_spec(found.spec_file, set_)
    connection = go_on(found, spec, address or _where(before))
    if not detach:
        follow(found, connection, from_now=True)


def _where(attempt: "Attempt") -> str:
    """The cluster that it ran on, as commands take it; another local one has another address."""
    from mhmoe_ray.cluster.contexts import LOCAL

    return LOCAL if attempt.local else attempt.address


def go_on(run: "RunDir", spec: "RunSpec", address: str | None) -> "Connection":
    """Start the next attempt of a run, and return its cluster.

    Args:
        run: that is over, and not finished.
        spec: its own, perhaps with another cluster section.
        address: of the cluster, as commands take it.
    """
    needed = [spec.storage, spec.data.prepared]
    connection = launch.cluster_for(spec.cluster, needed, spec.cluster.cpus, address)
    run.write_spec(spec)
    run.stop_file.unlink(missing_ok=True)
    launch.start(run, spec, connection)
    return connection


def _quiet(run: "RunDir") -> float:
    """Seconds since it last wrote a line."""
    from mhmoe_ray.runs import jsonl

    return time.time() - max(jsonl.modified(run.events_file), jsonl.modified(run.metrics_file))


def ended(run: "RunDir", force: bool, *, patient: bool = False) -> "Outcome | None":
    """How the run ended; None if its cluster is gone.

    Args:
        run: the run.
        force: take it for gone although the run wrote a moment ago.
        patient: where it did, wait until that is a while ago.

    Raises:
        RunError: it runs, or may still run.
        TokenError: its cluster wants a token that we do not have, so nobody can tell.
    """
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.watch import outcome, recorded_outcome
    from mhmoe_ray.errors import ClusterError, RunError, TokenError
    from mhmoe_ray.runs.state import last_attempt

    over = recorded_outcome(run)
    if over:
        return over
    try:
        over = outcome(run, connect(last_attempt(run).address))
    except TokenError:
        raise
    except ClusterError as e:
        while (quiet := _quiet(run)) < QUIET_SECONDS and not force:
            if not patient:
                why = f"its cluster does not answer ({e.why}), but it wrote something {quiet:.0f} s ago"
                fix = "make sure that no job of it runs any more, then wait, or use --force"
                raise RunError(f"run {run.id}", why, fix) from e
            note.print(f"waiting: its cluster does not answer, but it wrote something {quiet:.0f} s ago")
            time.sleep(QUIET_SECONDS - quiet)
        return None
    if over is None:
        raise RunError(f"run {run.id}", "it is still running", "see `mhmoe status`, or end it first: mhmoe stop")
    return over
