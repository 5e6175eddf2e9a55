"""Import of a folder in Hugging Face's layout to a run directory that can be served and exported."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from mhmoe_ray.checkpoint.huggingface.adapters import ADAPTERS
from mhmoe_ray.checkpoint.huggingface.config import MhmoeSection, read_config
from mhmoe_ray.checkpoint.huggingface.export import export
from mhmoe_ray.checkpoint.huggingface.files import StoredTensors, open_tensors, report_read_errors, write_files
from mhmoe_ray.checkpoint.huggingface.hub import local_folder
from mhmoe_ray.checkpoint.huggingface.imported_tokenizer import (
    ImportedTokenizer,
    read_chat_template,
    read_folder_tokenizer,
)
from mhmoe_ray.checkpoint.huggingface.names import TensorEntry, tensor_entries
from mhmoe_ray.checkpoint.huggingface.peft_config import model_folder
from mhmoe_ray.checkpoint.huggingface.peft_layout import LowRankTerm, read_adapter
from mhmoe_ray.checkpoint.manifest import CheckpointManifest, checkpoint_name, commit
from mhmoe_ray.data.chat.process import ChatTemplateError
from mhmoe_ray.data.chat.template import EXCHANGES, ChatTemplate
from mhmoe_ray.errors import CheckpointError, SpecError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import CHAT_TEMPLATE, RunDir, create_empty_run, mark_imported
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.spec.base import NAME_LENGTH, RUN_NAME
from mhmoe_ray.storage import Location, describe_file, location, make_folder, replace_file


def import_folder(
    source: Path,
    name: str | None,
    storage: str | Path,
    seq_len: int | None,
    origin: str | None = None,
    on_note: Callable[[str], object] = lambda line: None,
) -> RunDir:
    """Import a folder with config.json, tokenizer.json and safetensors as a run with one checkpoint.

    An adapter in PEFT's layout is merged into its base, which adapter_config.json names, and `on_note` gets a line.
    One layer of the weights at a time is in memory. The run's id begins with `name`, by default the name of the folder.
    `seq_len` limits the tokens of prompt and answer together, by default to the context length. The run records
    `origin`, by default the folder's path. An incomplete, damaged or unsupported folder is a CheckpointError, a
    tokenizer that does not fit a DataError, and an invalid name, or a storage that is remote or cannot be written, a
    SpecError.
    """
    name, root = _checked_name(source, name), _local_storage(storage)
    settings = model_folder(source)
    if settings != source:
        on_note(f"{origin or source} is an adapter, so it is merged into its base {settings}")
    model_type, config = read_config(settings, seq_len)
    imported_tokenizer = read_folder_tokenizer(settings, config)
    template = read_chat_template(settings)
    try:
        if template:
            ChatTemplate(template, "", "").accepts(EXCHANGES)
    except ChatTemplateError as e:
        raise CheckpointError(f"chat template of folder {source}", str(e), "correct it, or remove it") from e
    # Everything is checked before a run directory is created, so that a model that cannot be imported leaves none
    # behind.
    with open_groups(source, model_type, config.model) as groups:
        run = create_empty_run(root.absolute(), name)
        folder = root.absolute() / run.id
        try:
            replace_file(run.tokenizer_file, imported_tokenizer.content)
            if template:
                replace_file(folder / CHAT_TEMPLATE, template.encode())
            checkpoint = folder / "checkpoints" / checkpoint_name(0, 0)
            make_folder(checkpoint / "weights")
            write_files(checkpoint / "weights", groups, 1 + config.model.layers)
            commit(checkpoint, _manifest(run, checkpoint, config, imported_tokenizer))
            origin_fields = {"source": origin or str(source.absolute()), "model_type": model_type}
            events.record(run, "imported", **origin_fields, step=0, name=checkpoint.name)
            # This comes last, because from now on the directory counts as a run.
            mark_imported(run)
        except BaseException as e:
            # The incomplete directory is removed even after Ctrl-C.
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(e, OSError):
                reason, fix = e.strerror or str(e), "make room there, or name another folder as storage"
                raise SpecError(f"storage {storage}", reason, fix) from e
            raise
    return run


def import_checkpoint(
    checkpoint: Location, manifest: CheckpointManifest, name: str, storage: str | Path, seq_len: int | None
) -> RunDir:
    """Import the weights and the tokenizer of a run's checkpoint as another run; any failure is an MhmoeError.

    The arguments are those of `import_folder`.
    """
    # The name and the folder are checked before the weights are copied.
    root = _local_storage(storage)
    _checked_name(root, name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # An export followed by an import copies the weights and the tokenizer, and checks both. The export is beside
        # the new run, because other folders for temporary files are often small.
        with tempfile.TemporaryDirectory(prefix=".import-", dir=root) as folder:
            export(checkpoint, manifest, Path(folder) / "model")
            return import_folder(Path(folder) / "model", name, root, seq_len, origin=str(checkpoint))
    except OSError as e:
        reason, fix = e.strerror or str(e), "make room there, or name another folder as storage"
        raise SpecError(f"storage {storage}", reason, fix) from e


def _local_storage(storage: str | Path) -> Path:
    """Return the local folder that `storage` names; an object store is a SpecError."""
    root = location(storage)
    if not isinstance(root, Path):
        raise SpecError(f"storage {storage}", "an import is written to a local folder", "name one as storage")
    return root


@contextmanager
def open_groups(source: Path, model_type: str, model: ModelSpec) -> Iterator[Iterator[dict[str, Tensor]]]:
    """Open the weights of a folder in Hugging Face's layout, after checking names and shapes.

    The value iterates over groups of tensors by their checkpoint names: first those outside the layers, then those of
    each layer. One group at a time is in memory. An adapter in PEFT's layout is merged into the weights of its base. A
    folder with other tensors than the model's is a CheckpointError.
    """
    experts = model.moe_layers * model.moe.experts if model.moe else 0
    folder = model_folder(source, local_folder)
    with open_tensors(folder) as stored:
        # The names of a model with too many layers or experts would take minutes and gigabytes.
        if len(stored.names) < model.layers + experts:
            reason = f"it has {len(stored.names)} tensors for {model.layers:,} layers and {experts:,} experts"
            raise CheckpointError(f"folder {folder}", reason, "use the weights that belong to its config.json")
        groups = tensor_entries(model, ADAPTERS[model_type].name_replacements)
        _check_tensors(folder, stored, groups, stored.redundant_names(tied_embeddings=model.tied_embeddings))
        names = [name for group in groups for entry in group for name in entry.exported_names]
        yield _joined_groups(folder, stored, groups, read_adapter(source, model_type, stored, names))


def run_name(text: str) -> str:
    """Return a valid run name made from a text, such as the name of a folder."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:NAME_LENGTH].strip("-") or "imported"


def _checked_name(source: Path, name: str | None) -> str:
    """Return `name`, or one made from that of the folder; an invalid `name` is a SpecError."""
    if name is None:
        return run_name(source.absolute().name)
    if not re.fullmatch(RUN_NAME, name):
        reason = f"it is not made of lower-case letters, digits and dashes, {NAME_LENGTH} at most"
        raise SpecError(f"name {name}", reason, "choose another name")
    return name


def _check_tensors(
    source: Path, stored: StoredTensors, groups: list[list[TensorEntry]], redundant_names: set[str]
) -> None:
    """Check that a folder holds exactly a model's tensors, apart from redundant ones, as floats of the right shapes.

    Any other tensor, and tensors of different dtypes that are joined, are a CheckpointError.
    """
    all_entries = [entry for group in groups for entry in group]
    shapes = {name: shape for entry in all_entries for name, shape in entry.shapes.items()}
    problems = [
        *(f"{name} is missing" for name in sorted(shapes.keys() - stored.names)),
        *(f"{name} does not belong to such a model" for name in sorted(stored.names - redundant_names - shapes.keys())),
        *(
            f"{name} has shape {stored.shape(name)}, not {shapes[name]}"
            for name in sorted(shapes.keys() & stored.names)
            if stored.shape(name) != shapes[name]
        ),
    ]
    problems = problems or [
        f"{entry.exported_names[0]} and its like differ in dtype"
        for entry in all_entries
        if len({stored.dtype(name) for name in entry.exported_names}) > 1
    ]
    if problems:
        remainder_text = f" (and {len(problems) - 1} more such tensors)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"folder {source}", problems[0] + remainder_text, "use the weights that belong to its config.json"
        )


def _joined_groups(
    source: Path, stored: StoredTensors, groups: list[list[TensorEntry]], adapter: dict[str, LowRankTerm]
) -> Iterator[dict[str, Tensor]]:
    def read(name: str) -> Tensor:
        weight = stored.read(name)
        return adapter[name].add_to(weight) if name in adapter else weight

    for group in groups:
        with report_read_errors(f"folder {source}", "repair its disk, or get the folder again"):
            tensors = {
                entry.checkpoint_name: entry.join([read(name) for name in entry.exported_names]) for entry in group
            }
        yield tensors
        # Without `del` this group would stay in memory while the next one is read.
        del tensors


def _manifest(run: RunDir, checkpoint: Path, config: MhmoeSection, tokenizer: ImportedTokenizer) -> CheckpointManifest:
    files = {str(p.relative_to(checkpoint)): describe_file(p) for p in sorted(checkpoint.glob("weights/*"))}
    return CheckpointManifest(
        step=0,
        tokens=0,
        position=0,
        seed=None,
        world=1,
        ep=1,
        model=config.model,
        seq_len=config.seq_len,
        ends=tokenizer.end_tokens,
        adds_start=tokenizer.adds_start,
        tokenizer_sha256=describe_file(run.tokenizer_file).sha256,
        data_sha256=None,
        files=files,
    )
