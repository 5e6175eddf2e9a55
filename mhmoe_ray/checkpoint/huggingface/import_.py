"""Import a folder in Hugging Face's layout to a run directory that can be served and exported."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mhmoe_ray.checkpoint.huggingface.config import MhmoeConfig, named_ends, read_config
from mhmoe_ray.checkpoint.huggingface.files import Stored, open_stored, write_files
from mhmoe_ray.checkpoint.huggingface.names import Entry, entries
from mhmoe_ray.checkpoint.huggingface.tokenizer import tokenizer_identity
from mhmoe_ray.checkpoint.manifest import Manifest, checkpoint_name, commit
from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer, token_count
from mhmoe_ray.errors import CheckpointError, SpecError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import CHAT_TEMPLATE, RunDir, mark_imported, new_directory
from mhmoe_ray.spec.run import NAME, NAME_LENGTH
from mhmoe_ray.storage import describe_file, location, replace_file


def import_folder(source: Path, name: str | None, storage: str | Path, seq_len: int | None) -> RunDir:
    """Make a run of a model that was trained elsewhere; one layer at a time is in memory, in the dtype it is stored in.

    Args:
        source: folder with config.json, tokenizer.json and safetensors.
        name: name of the run, before its suffix; by default that of the folder.
        storage: local folder for the run directory.
        seq_len: number of tokens that prompt and answer may have together; by default as many as the model was made
            for.

    Raises:
        CheckpointError: the folder lacks something, is damaged, or holds a model that this package does not compute.
        DataError: its tokenizer does not fit the model.
        SpecError: the name is not valid, or `storage` is not a local folder that can be written.
    """
    name, root = _name(source, name), location(storage)
    if not isinstance(root, Path):
        raise SpecError(f"storage {storage}", "an import is written to a local folder", "name one with --storage")
    kind, config = read_config(source, seq_len)
    tokenizer = source / "tokenizer.json"
    if not tokenizer.is_file():
        why = "it has no tokenizer.json, which serving needs"
        raise CheckpointError(f"folder {source}", why, "add the one the model was trained with")
    with _reading(source):
        content, found = tokenizer.read_bytes(), describe_file(tokenizer).sha256
    loaded = load_tokenizer(tokenizer, config.model.vocab_size)
    if config.tokenizer_sha256 not in (None, found, tokenizer_identity(content)):
        why = "its tokenizer.json is not the one the model was trained with"
        raise CheckpointError(f"folder {source}", why, "restore that file")
    ends = named_ends(source, token_count(loaded)) - boundaries(loaded).ends
    template = _chat_template(source)
    with open_stored(source) as stored:
        groups = entries(config.model)
        _check_tensors(source, stored, groups)
        run = new_directory(root.absolute(), name)
        folder = root.absolute() / run.id
        try:
            replace_file(run.tokenizer_file, content)
            if template:
                (folder / CHAT_TEMPLATE).write_text(template)
            checkpoint = folder / "checkpoints" / checkpoint_name(0, 0)
            (checkpoint / "weights").mkdir(parents=True)
            write_files(checkpoint / "weights", _joined(source, stored, groups), len(groups))
            commit(checkpoint, _manifest(run, checkpoint, config, sorted(ends)))
            origin = {"source": str(source.absolute()), "model_type": kind}
            events.record(run, "imported", **origin, step=0, name=checkpoint.name)
            mark_imported(run)
        except BaseException as e:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(e, OSError):
                why, fix = e.strerror or str(e), "make room there, or name another folder with --storage"
                raise SpecError(f"storage {storage}", why, fix) from e
            raise
    return run


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Report an error in the context as one of reading the source folder, not of writing the storage.

    Raises:
        CheckpointError: an OSError or a SafetensorError was raised in the context.
    """
    try:
        yield
    except (OSError, SafetensorError) as e:
        why = f"it cannot be read: {getattr(e, 'strerror', None) or e}"
        raise CheckpointError(f"folder {source}", why, "mend the disk that it is on, or get the folder again") from e


def _chat_template(source: Path) -> str | None:
    """Return the chat template: a file of its own, or in older folders an entry of tokenizer_config.json; None without
    any.

    Raises:
        CheckpointError: it cannot be read, or there are several and none is the default.
    """
    file, settings = source / CHAT_TEMPLATE, source / "tokenizer_config.json"
    read = file if file.exists() else settings
    try:
        if read == file:
            return file.read_text()
        found = json.loads(settings.read_text()) if settings.exists() else {}
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as e:
        raise CheckpointError(f"folder {source}", f"{read.name} cannot be read ({e})", "get the folder again") from e
    template = found.get("chat_template")
    if isinstance(template, list):
        template = _default_of(template)
    if template is None or isinstance(template, str):
        return template
    why = f"the chat_template in its {settings.name} is no text, nor a list with one that is named default"
    raise CheckpointError(f"folder {source}", why, f"put the one to use into {CHAT_TEMPLATE} beside it")


def _default_of(templates: list[Any]) -> Any:
    """Return the template with the name "default" of a list of {"name": ..., "template": ...}.

    Without one, return the list itself, which is no template.
    """
    named = {t["name"]: t.get("template") for t in templates if isinstance(t, dict) and isinstance(t.get("name"), str)}
    return named.get("default") or templates


def _name(source: Path, name: str | None) -> str:
    if name is None:
        name = re.sub("[^a-z0-9]+", "-", source.absolute().name.lower()).strip("-")[:NAME_LENGTH].strip("-")
        return name or "imported"
    if not re.fullmatch(NAME, name):
        why = f"it is not made of lower-case letters, digits and dashes, {NAME_LENGTH} at most"
        raise SpecError(f"name {name}", why, "choose another --name")
    return name


def _check_tensors(source: Path, stored: Stored, groups: list[list[Entry]]) -> None:
    """Check that every tensor of the model is in the folder, as floats and in its shape, and no other tensor.

    Raises:
        CheckpointError: a tensor is missing, does not belong to the model, has another shape or is not of floats, or
            tensors that are joined differ in dtype.
    """
    every = [entry for group in groups for entry in group]
    shapes = {name: shape for entry in every for name, shape in entry.shapes.items()}
    wrong = [
        *(f"{name} is missing" for name in sorted(shapes.keys() - stored.names)),
        *(f"{name} does not belong to such a model" for name in sorted(stored.names - shapes.keys())),
        *(
            f"{name} has shape {stored.shape(name)}, not {shapes[name]}"
            for name in sorted(shapes.keys() & stored.names)
            if stored.shape(name) != shapes[name]
        ),
    ]
    wrong = wrong or [
        f"{entry.theirs[0]} and its like differ in dtype"
        for entry in every
        if len({stored.dtype(name) for name in entry.theirs}) > 1
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more such tensors)" if len(wrong) > 1 else ""
        raise CheckpointError(f"folder {source}", wrong[0] + more, "its weights must be those its config.json tells of")


def _joined(source: Path, stored: Stored, groups: list[list[Entry]]) -> Iterator[dict[str, Tensor]]:
    for group in groups:
        with _reading(source):
            tensors = {entry.ours: entry.join([stored.read(name) for name in entry.theirs]) for entry in group}
        yield tensors
        del tensors  # before the next group is read


def _manifest(run: RunDir, checkpoint: Path, config: MhmoeConfig, ends: list[int]) -> Manifest:
    files = {str(p.relative_to(checkpoint)): describe_file(p) for p in sorted(checkpoint.glob("weights/*"))}
    return Manifest(
        step=0,
        tokens=0,
        position=0,
        seed=None,
        world=1,
        ep=1,
        model=config.model,
        seq_len=config.seq_len,
        ends=ends,
        tokenizer_sha256=describe_file(run.tokenizer_file).sha256,
        data_sha256=None,
        files=files,
    )
