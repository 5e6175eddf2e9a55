"""Write the checkpoint of step 0 of a run that starts from the weights of other models."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from mhmoe_ray.checkpoint.format import SUFFIX, Slice, write_slices
from mhmoe_ray.checkpoint.huggingface.hub import local_folder
from mhmoe_ray.checkpoint.huggingface.import_ import open_groups
from mhmoe_ray.checkpoint.load import WeightsReader, read_index, read_tensors
from mhmoe_ray.checkpoint.manifest import (
    PARTS,
    CheckpointManifest,
    checkpoint_name,
    commit,
    committed_checkpoints,
    read_manifest,
    uncommitted_checkpoints,
)
from mhmoe_ray.checkpoint.start.compatibility import check_start, check_tokenizer
from mhmoe_ray.checkpoint.start.record import build_record
from mhmoe_ray.checkpoint.start.source import StartModel, find_start_model
from mhmoe_ray.checkpoint.start.transform import StartTransform
from mhmoe_ray.data.shards.manifest import data_digest
from mhmoe_ray.distributed.rounded_adamw import MOMENT_NAMES
from mhmoe_ray.model.build import build_model
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.start import write_start
from mhmoe_ray.spec import ModelSpec, RunSpec
from mhmoe_ray.storage import FileEntry, Location, create_file, describe_file, remove_tree, replace_file


def write_start_checkpoint(run: RunDir, spec: RunSpec) -> None:
    """Write a run's checkpoint of step 0 and its start record, unless it has a checkpoint already.

    The run's data is prepared, and its directory has the tokenizer. Only one layer of each start model at a time is in
    memory. A model that cannot be read, or from which the run cannot start, is an MhmoeError.
    """
    start = spec.start
    assert start is not None
    if committed_checkpoints(run):
        return
    start_models = [find_start_model(source, spec.storage) for source in start.sources]
    check_start(start, spec.model, start_models)
    for start_model in start_models:
        check_tokenizer(start_model, run.tokenizer_file)
        if start_model.manifest is not None:
            read_manifest(start_model.path, PARTS if start.optimizer else ("weights",))
    first_model = start_models[0]
    record = build_record(spec, start_models)
    # An earlier attempt may have been killed while it wrote a checkpoint, which is removed here.
    for folder in uncommitted_checkpoints(run):
        remove_tree(folder)
    checkpoint = run.checkpoints / checkpoint_name(0, 0)
    files = _write_weights(checkpoint / "weights", spec, start_models)
    if start.optimizer:
        files |= _write_moments(checkpoint / "optim", spec, first_model)
    if first_model.chat_template is not None and not run.chat_template_file.exists():
        replace_file(run.chat_template_file, first_model.chat_template.encode())
    # The record is written before the manifest, because a run with a committed checkpoint must have it.
    write_start(run, record)
    manifest = CheckpointManifest(
        step=0,
        updates_before=first_model.manifest.updates if start.optimizer and first_model.manifest else 0,
        tokens=0,
        position=0,
        seed=spec.seed,
        world=1,
        ep=1,
        model=spec.model,
        seq_len=spec.data.seq_len,
        ends=first_model.ends,
        adds_start=first_model.adds_start,
        tokenizer_sha256=describe_file(run.tokenizer_file).sha256,
        data_sha256=data_digest(spec.data.prepared),
        files=files,
    )
    commit(checkpoint, manifest)
    names = [ancestor.describe() for ancestor in record.ancestors]
    events.record(run, "initialized", how=start.how, sources=names, step=0, name=checkpoint.name)


def _write_weights(folder: Location, spec: RunSpec, start_models: list[StartModel]) -> dict[str, FileEntry]:
    """Write the weights of step 0, a file for each layer; return the files' sizes and hashes."""
    with torch.device("meta"):
        model, start_model = build_model(spec.model), build_model(start_models[0].model)
    transform = StartTransform(model, start_model, spec.seed, spec.start.new_experts if spec.start else None)
    with ExitStack() as stack:
        sources = [_open_groups(start_model, stack) for start_model in start_models]
        # The names are grouped by layer, like the tensors of the start models, so that both can be read group by group.
        name_groups = model.tensors_by_layer()
        files: dict[str, FileEntry] = {}
        for number, (names, *source_groups) in enumerate(zip(name_groups, *sources, strict=True)):
            tensors = {}
            for name in names:
                source_name = transform.source_name(name)
                source_tensors = [group[source_name] for group in source_groups] if source_name else []
                tensors[name] = transform.tensor(name, source_tensors)
            files |= _write_file(folder, number, tensors)
            # Without `del` this group would stay in memory while the next one is read.
            del tensors, source_groups
    return files


def _open_groups(start_model: StartModel, stack: ExitStack) -> Iterator[dict[str, Tensor]]:
    """Return an iterator over a model's tensors in groups like `Trunk.tensors_by_layer`; `stack` closes its files."""
    if start_model.model_type is None:
        return _checkpoint_groups(start_model.path, start_model.model)
    # For a model of the Hugging Face hub, only the settings were downloaded before. This downloads the weights, too.
    folder = local_folder(start_model.source)
    return stack.enter_context(open_groups(folder, start_model.model_type, start_model.model))


def _checkpoint_groups(checkpoint: Location, spec: ModelSpec) -> Iterator[dict[str, Tensor]]:
    with torch.device("meta"):
        model = build_model(spec)
    weights = WeightsReader(checkpoint)
    for group in model.tensors_by_layer():
        yield weights.read({name: t.shape for name, t in group.items()})


def _write_moments(folder: Location, spec: RunSpec, start_model: StartModel) -> dict[str, FileEntry]:
    """Copy the optimizer's moments and the training buffers from a checkpoint, a file for each layer."""
    with torch.device("meta"):
        model = build_model(spec.model)
    parameters, buffers = dict(model.named_parameters()), model.training_buffers()
    stored_names = read_index(start_model.path / "optim").keys()
    files: dict[str, FileEntry] = {}
    for number, names in enumerate(model.tensors_by_layer()):
        shapes = {
            f"{moment}.{name}": parameters[name].shape
            for moment in MOMENT_NAMES
            for name in names
            if name in parameters
        }
        if number == 0:
            # These buffers hold each expert's share of the choices of the last step, for a balance loss over whole
            # steps. A run without such a loss has none.
            shapes |= {name: t.shape for name, t in buffers.items() if name in stored_names}
        tensors = read_tensors(start_model.path / "optim", shapes)
        if number == 0:
            tensors |= {name: torch.zeros(t.shape) for name, t in buffers.items() if name not in stored_names}
        files |= _write_file(folder, number, tensors)
    return files


def _write_file(folder: Location, number: int, tensors: Mapping[str, Tensor]) -> dict[str, FileEntry]:
    """Write a part of a folder's tensors, and return its entry in the checkpoint manifest, by name."""
    file_name = f"part_{number:05d}{SUFFIX}"
    slices = {name: Slice(t.contiguous(), (0,) * t.ndim, tuple(t.shape)) for name, t in tensors.items()}
    with create_file(folder / file_name) as stream:
        return {f"{folder.name}/{file_name}": write_slices(stream, slices)}
