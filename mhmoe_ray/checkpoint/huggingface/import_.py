"""Import of a folder in Hugging Face's layout to a run directory that can be served and exported."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from mhmoe_ray.checkpoint.huggingface.adapters import ADAPTERS
from mhmoe_ray.checkpoint.huggingface.config import MhmoeSection, read_config, read_end_tokens
from mhmoe_ray.checkpoint.huggingface.files import StoredTensors, open_tensors, write_files
from mhmoe_ray.checkpoint.huggingface.names import TensorEntry, tensor_entries
from mhmoe_ray.checkpoint.huggingface.tokenizer import (
    TOKENIZER_CONFIG,
    add_start_token,
    special_token,
    tokenizer_identity,
)
from mhmoe_ray.checkpoint.manifest import CheckpointManifest, checkpoint_name, commit
from mhmoe_ray.data.tokenizer import BEGIN_TOKEN, added_start_token, boundaries, find_boundaries, token_count
from mhmoe_ray.data.tokenizer.load import check_tokenizer, read_tokenizer
from mhmoe_ray.errors import CheckpointError, SpecError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import CHAT_TEMPLATE, RunDir, create_empty_run, mark_imported
from mhmoe_ray.spec.run import NAME, NAME_LENGTH
from mhmoe_ray.storage import describe_file, location, replace_file


def import_folder(source: Path, name: str | None, storage: str | Path, seq_len: int | None) -> RunDir:
    """Import a model that was trained elsewhere: create a run directory with one checkpoint that holds its weights.

    One layer at a time is in memory.

    Args:
        source: folder with config.json, tokenizer.json and safetensors.
        name: name of the run, before its suffix; None for the name of the folder.
        storage: local folder for the run directory.
        seq_len: number of tokens that prompt and answer may have together; None for the model's context length.

    Raises:
        CheckpointError: the folder lacks a file, is damaged, or holds a model that this package does not compute.
        DataError: its tokenizer does not fit the model.
        SpecError: the name is not valid, or `storage` is not a local folder that can be written.
    """
    name, root = _checked_name(source, name), location(storage)
    if not isinstance(root, Path):
        raise SpecError(f"storage {storage}", "an import is written to a local folder", "name one with --storage")
    model_type, config = read_config(source, seq_len)
    imported_tokenizer = _read_tokenizer(source, config)
    template = _read_chat_template(source)
    with open_tensors(source) as stored:
        groups = tensor_entries(config.model, ADAPTERS[model_type].name_replacements)
        # Everything is checked before a run directory is created.
        _check_tensors(source, stored, groups)
        run = create_empty_run(root.absolute(), name)
        folder = root.absolute() / run.id
        try:
            replace_file(run.tokenizer_file, imported_tokenizer.content)
            if template:
                (folder / CHAT_TEMPLATE).write_text(template)
            checkpoint = folder / "checkpoints" / checkpoint_name(0, 0)
            (checkpoint / "weights").mkdir(parents=True)
            write_files(checkpoint / "weights", _joined_groups(source, stored, groups), len(groups))
            commit(checkpoint, _manifest(run, checkpoint, config, imported_tokenizer))
            origin_fields = {"source": str(source.absolute()), "model_type": model_type}
            events.record(run, "imported", **origin_fields, step=0, name=checkpoint.name)
            # Last: from now on the directory counts as a run.
            mark_imported(run)
        except BaseException as e:
            # Also after Ctrl-C.
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(e, OSError):
                reason, fix = e.strerror or str(e), "make room there, or name another folder with --storage"
                raise SpecError(f"storage {storage}", reason, fix) from e
            raise
    return run


@contextmanager
def _report_read_errors(source: Path) -> Iterator[None]:
    """Context manager that turns an error into one about reading the source folder, not about writing the storage.

    Raises:
        CheckpointError: an OSError or a SafetensorError was raised in the context.
    """
    try:
        yield
    except (OSError, SafetensorError) as e:
        reason = f"it cannot be read: {getattr(e, 'strerror', None) or e}"
        raise CheckpointError(f"folder {source}", reason, "repair its disk, or get the folder again") from e


class ImportedTokenizer(NamedTuple):
    """Tokenizer of an imported model, and what the checkpoint manifest says about it."""

    content: bytes
    """Content of tokenizer.json for the run directory."""
    adds_start: bool
    """Whether a start token precedes a text."""
    end_tokens: list[int]
    """Token ids that end a text in addition to the tokenizer's own."""


def _read_tokenizer(source: Path, config: MhmoeSection) -> ImportedTokenizer:
    """Read and check the tokenizer of a folder in Hugging Face's layout.

    Raises:
        CheckpointError: the folder has no tokenizer.json, or not the one that the model was trained with, or a file
            cannot be read.
        DataError: the tokenizer does not fit the model, or has no token that can start a text.
    """
    file = source / "tokenizer.json"
    if not file.is_file():
        reason = "it has no tokenizer.json, which serving needs"
        raise CheckpointError(f"folder {source}", reason, "add the one the model was trained with")
    with _report_read_errors(source):
        content, sha256 = file.read_bytes(), describe_file(file).sha256
    tokenizer, settings = read_tokenizer(file), _read_settings(source)
    # A trainer may have saved truncation or padding, which would hide the start token from the checks below.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    adds_start = config.adds_start
    if adds_start is None:
        # transformers' class of a tokenizer with <s> adds it even without a post-processor, unless it is told not to.
        default = tokenizer.token_to_id(BEGIN_TOKEN) is not None
        adds_start = added_start_token(tokenizer) is not None or bool(settings.get("add_bos_token", default))
    if find_boundaries(tokenizer) is None:
        start = special_token(tokenizer, settings, "bos_token", "cls_token", "eos_token", "pad_token")
        if start is not None:
            content = add_start_token(content, start)
            tokenizer = Tokenizer.from_buffer(content)
    check_tokenizer(tokenizer, file, config.model.vocab_size)
    if config.tokenizer_sha256 not in (None, sha256, tokenizer_identity(content)):
        reason = "its tokenizer.json is not the one the model was trained with"
        raise CheckpointError(f"folder {source}", reason, "restore that file")
    end_tokens = read_end_tokens(source, token_count(tokenizer))
    if (end_token := special_token(tokenizer, settings, "eos_token")) is not None:
        end_tokens.add(end_token)
    return ImportedTokenizer(content, adds_start, sorted(end_tokens - boundaries(tokenizer).ends))


def _read_settings(source: Path) -> dict[str, Any]:
    """Return the content of a folder's tokenizer_config.json; an empty dictionary if there is none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    file = source / TOKENIZER_CONFIG
    try:
        settings = json.loads(file.read_text()) if file.exists() else {}
        if not isinstance(settings, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as e:
        raise CheckpointError(f"folder {source}", f"{file.name} cannot be read ({e})", "get the folder again") from e
    return settings


def _read_chat_template(source: Path) -> str | None:
    """Return the chat template of a folder in Hugging Face's layout; None if it has none.

    Raises:
        CheckpointError: the template cannot be read, or there are several and none is the default.
    """
    # Older folders have it as an entry of tokenizer_config.json.
    file = source / CHAT_TEMPLATE
    if file.exists():
        try:
            return file.read_text()
        except (OSError, ValueError) as e:
            raise CheckpointError(
                f"folder {source}", f"{file.name} cannot be read ({e})", "get the folder again"
            ) from e
    template = _read_settings(source).get("chat_template")
    if isinstance(template, list):
        template = _default_template(template)
    if template is None or isinstance(template, str):
        return template
    reason = f"the chat_template in its {TOKENIZER_CONFIG} is no text, nor a list with one that is named default"
    raise CheckpointError(f"folder {source}", reason, f"put the one to use into {CHAT_TEMPLATE} beside it")


def _default_template(templates: list[Any]) -> Any:
    """Return the template named "default" in a list of {"name": ..., "template": ...}; the list itself without one."""
    templates_by_name = {
        t["name"]: t.get("template") for t in templates if isinstance(t, dict) and isinstance(t.get("name"), str)
    }
    return templates_by_name.get("default") or templates


def run_name(text: str) -> str:
    """Return a valid name of a run that is like `text`, such as the name of a folder."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:NAME_LENGTH].strip("-") or "imported"


def _checked_name(source: Path, name: str | None) -> str:
    """Return the name of the run: `name`, or without it one made from the name of the folder.

    Raises:
        SpecError: `name` is not valid.
    """
    if name is None:
        return run_name(source.absolute().name)
    if not re.fullmatch(NAME, name):
        reason = f"it is not made of lower-case letters, digits and dashes, {NAME_LENGTH} at most"
        raise SpecError(f"name {name}", reason, "choose another --name")
    return name


def _check_tensors(source: Path, stored: StoredTensors, groups: list[list[TensorEntry]]) -> None:
    """Check that the folder holds exactly the tensors of the model, as floats and in their shapes.

    Raises:
        CheckpointError: a tensor is missing, does not belong to the model, has another shape or is not of floats, or
            tensors that are joined differ in dtype.
    """
    all_entries = [entry for group in groups for entry in group]
    shapes = {name: shape for entry in all_entries for name, shape in entry.shapes.items()}
    problems = [
        *(f"{name} is missing" for name in sorted(shapes.keys() - stored.names)),
        *(f"{name} does not belong to such a model" for name in sorted(stored.names - shapes.keys())),
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


def _joined_groups(source: Path, stored: StoredTensors, groups: list[list[TensorEntry]]) -> Iterator[dict[str, Tensor]]:
    """Read the tensors of one group after the other, and yield the model's tensors of each group by name."""
    for group in groups:
        with _report_read_errors(source):
            tensors = {
                entry.checkpoint_name: entry.join([stored.read(name) for name in entry.exported_names])
                for entry in group
            }
        yield tensors
        # Without `del` this group would stay in memory while the next one is read.
        del tensors


def _manifest(run: RunDir, checkpoint: Path, config: MhmoeSection, tokenizer: ImportedTokenizer) -> CheckpointManifest:
    """Return the manifest of an imported checkpoint of step 0, with the hashes of its files."""
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
