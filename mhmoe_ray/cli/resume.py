"""`mhmoe resume`: go on with a run from its newest whole checkpoint."""

from typing import TYPE_CHECKING

from mhmoe_ray.cli.common import AddressOption, DetachOption, ForceOption, RunArg, SetOption, StorageOption
from mhmoe_ray.cli.complete import STORAGE
from mhmoe_ray.cli.follow import follow
from mhmoe_ray.cli.launch import ended, go_on

if TYPE_CHECKING:
    from mhmoe_ray.runs.directory import Attempt


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
    from mhmoe_ray.runs.directory import find_run, last_attempt
    from mhmoe_ray.spec import load_resolved_spec, parse_overrides

    found = find_run(run, storage, with_job=True)
    for keys, _ in parse_overrides(set_):
        if keys[0] != "cluster":
            why = "a resumed run must go on exactly as it would have"
            raise SpecError(f"override {'.'.join(keys)}", why, "change only cluster keys, or submit a new run")
    before = last_attempt(found)
    over = ended(found, force)
    if over.state == "finished":
        raise RunError(f"run {found.id}", "it is finished", "submit a new run to train longer")
    spec = load_resolved_spec(found.spec_file, set_)
    connection = go_on(found, spec, address or _where(before))
    if not detach:
        follow(found, connection, from_now=True)


def _where(attempt: "Attempt") -> str:
    """The cluster that it ran on, as commands take it; another local one has another address."""
    from mhmoe_ray.cluster.connect import LOCAL

    return LOCAL if attempt.local else attempt.address
