"""`mhmoe resume`: go on with a run from its newest whole checkpoint."""

from mhmoe_ray.cli import launch
from mhmoe_ray.cli.common import STORAGE, AddressOption, DetachOption, RunArg, SetOption, StorageOption
from mhmoe_ray.cli.follow import follow


def resume(
    run: RunArg = None,
    set_: SetOption = [],  # noqa: B006
    storage: StorageOption = STORAGE,
    address: AddressOption = None,
    detach: DetachOption = False,
) -> None:
    """Go on with a run that stopped, failed or lost its cluster, from its newest whole checkpoint.

    Only keys of the cluster section may change: with them the run goes on exactly as it would have.
    """
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.watch import outcome, recorded_outcome
    from mhmoe_ray.errors import ClusterError, RunError, SpecError
    from mhmoe_ray.runs.layout import find_run
    from mhmoe_ray.runs.state import read_attempts
    from mhmoe_ray.spec import load_spec, parse_overrides

    found = find_run(run, storage)
    for keys, _ in parse_overrides(set_):
        if keys[0] != "cluster":
            why = "a resumed run must go on exactly as it would have"
            raise SpecError(f"override {'.'.join(keys)}", why, "change only cluster keys, or submit a new run")
    over = recorded_outcome(found)
    if over is None:
        try:
            over = outcome(found, connect(read_attempts(found)[-1].address))
        except ClusterError:
            pass  # its cluster is gone, and the run with it
        else:
            if over is None:
                raise RunError(f"run {found.id}", "it is still running", "follow it with `mhmoe status`")
    if over and over.state == "finished":
        raise RunError(f"run {found.id}", "it is finished", "submit a new run to train longer")
    spec = load_spec(found.spec_file, set_)
    connection = launch.cluster_for(spec, address)
    found.write_spec(spec)
    found.stop_file.unlink(missing_ok=True)
    launch.start(found, spec, connection)
    if not detach:
        follow(found, connection)
