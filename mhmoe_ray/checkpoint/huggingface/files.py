"""Safetensors files in Hugging Face's layout, read tensor by tensor and written one group of tensors at a time."""

import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mhmoe_ray.checkpoint.format import DTYPES
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.parsing import ParseError, parse_object
from mhmoe_ray.storage import is_special, make_folder, read_file, sync

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth")
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}


class StoredTensors:
    """Tensors in the safetensors files of a folder, by name; only headers are in memory until `read` is called."""

    def __init__(self, folder: Path, files: dict[str, Any]) -> None:
        """Find the file of each tensor in the open safetensors `files`; a tensor in two files is a CheckpointError."""
        self._folder, self._files = folder, files
        self._file_of: dict[str, str] = {}
        for file, open_file in files.items():
            for name in open_file.keys():  # noqa: SIM118  # safetensors' handle is no dict
                if name in self._file_of:
                    reason = f"{name} is both in {self._file_of[name]} and in {file}"
                    raise CheckpointError(f"folder {folder}", reason, "remove the file that does not belong to it")
                self._file_of[name] = file

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    @property
    def metadata(self) -> dict[str, str]:
        return {key: text for file in self._files.values() for key, text in (file.metadata() or {}).items()}

    def redundant_names(self, *, tied_embeddings: bool) -> set[str]:
        """Return the names of tensors that some programs store although a model does not need them.

        These are the frequencies of rotary embeddings, and with tied embeddings a copy of the embedding as output
        layer.
        """
        names = {name for name in self._file_of if name.endswith(".rotary_emb.inv_freq")}
        if tied_embeddings and {OUTPUT, EMBEDDING} <= self.names and self.read(OUTPUT).equal(self.read(EMBEDDING)):
            names.add(OUTPUT)
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; (1,) for a scalar."""
        # In the model, a scalar is a tensor of one element.
        return tuple(self._slice(name).get_shape()) or (1,)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; CheckpointError unless it holds floats of 16 to 64 bits."""
        dtype_name = self._slice(name).get_dtype()
        if dtype_name not in FLOATS:
            reason = f"{name} is stored as {dtype_name}, and only {', '.join(FLOATS)} are understood"
            raise CheckpointError(f"folder {self._folder}", reason, "use weights that are not quantised")
        return FLOATS[dtype_name]

    def read(self, name: str) -> Tensor:
        """Read a tensor into memory."""
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)


@contextmanager
def open_tensors(folder: Path, file_name: str | None = None) -> Iterator[StoredTensors]:
    """Open the weights of a folder: the file `file_name`, or by default those of a model.

    A model's weights are in one safetensors file, or in the files that its index names.

    Missing weights, a missing file of the index, or a damaged file is a CheckpointError.
    """
    subject, fix = f"folder {folder}", "get the folder again"
    with ExitStack() as stack:
        files = {}
        for name in [file_name] if file_name else _file_names(folder):
            if is_special(folder / name):
                raise CheckpointError(subject, f"{name} is no regular file", fix)
            try:
                files[name] = stack.enter_context(safe_open(str(folder / name), framework="pt"))
            except OSError as e:
                raise CheckpointError(subject, f"{name} cannot be read: {e.strerror or 'it is not there'}", fix) from e
            except SafetensorError as e:
                raise CheckpointError(subject, f"{name} is damaged or no safetensors file ({e})", fix) from e
        yield StoredTensors(folder, files)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a staging directory that gets the name `target` when the block ends without an error.

    A target that has files, and a failure to write, are a CheckpointError.
    """
    subject = f"folder {target}"
    # All files go to a staging directory, so that no reader meets an incomplete folder.
    staging = target.absolute().with_name(f"{target.name}.partial-{secrets.token_hex(3)}")
    try:
        if target.exists() and any(target.iterdir()):
            raise CheckpointError(subject, "it is not empty", "name a folder that does not exist yet")
        make_folder(staging)
        try:
            yield staging
            staging.rename(target)
            sync(target.absolute().parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as e:
        raise CheckpointError(subject, e.strerror or str(e), "name a folder you can write") from e


@contextmanager
def report_read_errors(subject: str, fix: str) -> Iterator[None]:
    """Turn an error of reading `subject` into a CheckpointError, so that it is not taken for an error of writing."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise CheckpointError(subject, f"it cannot be read: {getattr(e, 'strerror', None) or e}", fix) from e


def _file_names(folder: Path) -> list[str]:
    """Return the names of a folder's weight files; CheckpointError without any, or for a damaged index."""
    subject = f"folder {folder}"
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        try:
            names = sorted({str(name) for name in parse_object(read_file(folder / INDEX))["weight_map"].values()})
        except OSError as e:
            raise CheckpointError(subject, f"its {INDEX} cannot be read ({e.strerror})", "make it readable") from e
        except (ParseError, KeyError, AttributeError) as e:
            raise CheckpointError(subject, f"its {INDEX} is damaged", "get the folder again") from e
        # A name that is not printable may have half of a surrogate pair, which no file name can have.
        if any(not name or Path(name).name != name or not name.isprintable() for name in names):
            raise CheckpointError(subject, f"its {INDEX} names files that cannot be in it", "get the folder again")
        return names
    pickle_name = next((p.name for pattern in PICKLES for p in sorted(folder.glob(pattern))), None)
    if pickle_name:
        reason = (
            f"its weights ({pickle_name}) are pickles, which run code when they are read; only safetensors are read"
        )
        raise CheckpointError(
            subject, reason, "get its safetensors files, or save the model again with save_pretrained"
        )
    raise CheckpointError(subject, f"it has neither {SINGLE} nor {INDEX}", "name a folder with a model in safetensors")


def write_files(folder: Path, groups: Iterable[dict[str, Tensor]], count: int) -> dict[str, str]:
    """Write each group of tensors to one of `count` safetensors files, and return the file of each tensor by name.

    Each group is produced when it is written. A full disk is an OSError.
    """
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        write_file(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        # Without `del` this group would stay in memory while the next one is produced.
        del tensors
    sync(folder)
    return weight_map


def write_file(file: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write tensors to a safetensors file. A full disk is an OSError."""
    try:
        save_file(tensors, file, metadata={"format": "pt", **metadata})
    except SafetensorError as e:
        # A full disk raises this error of safetensors instead of an OSError.
        raise OSError(str(e)) from e
    # safetensors creates files that only their owner can read, so they get the read and write permissions of the
    # folder.
    file.chmod(file.parent.stat().st_mode & 0o666)
    sync(file)
