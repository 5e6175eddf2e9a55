"""Record of a run's start: the models that gave its weights (ancestors), and how many samples these have read."""

from collections.abc import Sequence

from mhmoe_ray.checkpoint.start.source import SWEEP_PREFIX, StartModel, find_start_model
from mhmoe_ray.data.order.mixture import compute_mixture
from mhmoe_ray.data.shards.manifest import DataManifest, data_digest, read_data_manifest, require_data_manifest
from mhmoe_ray.errors import DataError, SpecError
from mhmoe_ray.runs.start import StartRecord, read_start
from mhmoe_ray.spec import RunSpec


def plan_start(spec: RunSpec) -> StartRecord | None:
    """Return the record of start models that a run would get; None if it begins with random weights.

    It is also None for a start from another run of the sweep, which may not exist yet. A model that cannot be read is a
    RunError or CheckpointError; a data order that cannot be continued is a SpecError or DataError.
    """
    start = spec.start
    if start is None or any(source.startswith(SWEEP_PREFIX) for source in start.sources):
        return None
    return build_record(spec, [find_start_model(source, spec.storage) for source in start.sources])


def build_record(spec: RunSpec, start_models: Sequence[StartModel]) -> StartRecord:
    """Return the record of a run's start; SpecError or DataError if the data order cannot be continued."""
    start = spec.start
    assert start is not None
    return StartRecord(
        how=start.how,
        optimizer=start.optimizer,
        ancestors=[start_model.ancestor for start_model in start_models],
        samples_before=_samples_before(spec, start_models[0]) if start.order == "continue" else {},
    )


def _samples_before(spec: RunSpec, start_model: StartModel) -> dict[str, int]:
    """Return the samples of each domain that an earlier run and its ancestors have read up to a checkpoint.

    SpecError: the earlier run was not trained here, or has another seed. DataError: its data is gone or changed, or a
    domain has other samples in the new run's data.
    """
    run, manifest = start_model.run, start_model.manifest
    if run is None or manifest is None or run.is_imported:
        reason = f"order: continue needs a run that was trained here, and {start_model.ancestor.name} was not"
        raise SpecError("start", reason, "remove order")
    earlier_spec = run.spec()
    if spec.seed != earlier_spec.seed:
        reason = f"seed is {spec.seed}, and that of {run.id}, whose order it continues, is {earlier_spec.seed}"
        raise SpecError("start", reason, f"set seed to {earlier_spec.seed}, or remove order")
    folder = earlier_spec.data.prepared
    earlier_data = require_data_manifest(folder)
    if data_digest(folder) != manifest.data_sha256:
        reason = f"it is not what {run.id} was trained on"
        raise DataError(f"prepared data {folder}", reason, "restore it, or remove start.order")
    own_data = read_data_manifest(spec.data.prepared)
    if own_data is not None:
        _check_same_samples(earlier_data, own_data, spec)
    record = read_start(run)
    earlier_counts = record.samples_before if record else {}
    mixture = compute_mixture(earlier_spec, earlier_data, earlier_counts)
    counts = mixture.order.domain_counts(manifest.position)
    own_counts = {
        domain.name: count + earlier_count
        for domain, count, earlier_count in zip(mixture.domains, counts, mixture.samples_before, strict=True)
    }
    # A domain that is missing from the earlier run's data may have been read by the runs from which that run started.
    return {**earlier_counts, **own_counts}


def _check_same_samples(earlier_data: DataManifest, own_data: DataManifest, spec: RunSpec) -> None:
    """Check that each domain in the data of both runs has the same samples in both; DataError if not."""
    for name in sorted(earlier_data.domains.keys() & own_data.domains.keys()):
        earlier_hashes, own_hashes = (
            [shard.sha256 for shard in data.domains[name].shards] for data in (earlier_data, own_data)
        )
        if earlier_hashes != own_hashes:
            reason = f"domain {name} has other samples than the data of the run whose order it continues"
            fix = "prepare the same text with the same data.seq_len, packing and tokenizer, or remove start.order"
            raise DataError(f"prepared data {spec.data.prepared}", reason, fix)
