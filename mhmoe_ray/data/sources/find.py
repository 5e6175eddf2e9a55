"""Discovery of the raw files of a spec: the files of each source, their format, and the domain of each file.

A file's domain is the folder right below the source's path, in RedPajama-V2 its language; files that lie in the path
itself belong to the domain `all`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path

import pyarrow as pa

from mhmoe_ray.data.domains import subfolder_of
from mhmoe_ray.data.sources.items import RawFile
from mhmoe_ray.data.sources.redpajama_v2 import NAME, Beside
from mhmoe_ray.data.sources.storage import Listed, Storage, below, one_line
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec, FilterSpec, Format, SourceSpec
from mhmoe_ray.spec.data import SUFFIXES

WHOLE = "all"
"""Subfolder name in the domain of files that lie in no subfolder."""

FILES_ALONE = 1000
"""Number of files in a spec up to which each file is a block of its own."""
BLOCK_BYTES = 4 << 20
"""Bytes of files from which a block of several files is full."""

FIRST_BYTES = 4096
"""Number of first bytes of a file that its fingerprint includes: files that differ only later nearly always have
different sizes."""

_PREPARED = ("manifest.json", "tokenizer.json", "quarantine.jsonl")
"""Files of a prepared folder, which no other folder has together."""
_PARTIAL = re.compile(r"\.partial-[0-9a-f]{8}/")
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def find_files(spec: DataSpec) -> list[RawFile]:
    """Return all raw files of a spec, in an order that depends on names only.

    Raises:
        DataError: a source or a named subfolder is missing or holds no file of a known format.
    """
    found = []
    for name, source in spec.sources.items():
        found += _of_source(name, source, spec.subfolders(name), spec.prepared)
    return found


def problems(spec: DataSpec) -> list[DataError]:
    """Return the errors in a spec's local sources; object stores are not checked."""
    found = []
    for name, source in spec.sources.items():
        if "://" not in source.path:
            try:
                _of_source(name, source, spec.subfolders(name), spec.prepared)
            except DataError as e:
                found.append(e)
    return found


def fingerprints(spec: DataSpec) -> dict[str, str]:
    """Return fingerprints of the contents of local sources, independent of where they lie.

    The fingerprint of a source, by its name, is a hash over the names, sizes and first bytes of its files. A source in
    an object store has none: it is identified by its URI.

    Raises:
        DataError: sources are missing or cannot be used, as for `find_files`.
    """
    found = {}
    for name, source in spec.sources.items():
        if "://" in source.path:
            continue
        root = Storage(source.path).files().root
        digest = hashlib.sha256()
        for file in _of_source(name, source, spec.subfolders(name), spec.prepared):
            with Path(file.path).open("rb") as stream:
                first = hashlib.sha256(stream.read(FIRST_BYTES)).hexdigest()
            digest.update(f"{file.domain}\0{below(root, file.path)}\0{file.size}\0{first}\n".encode())
        found[name] = digest.hexdigest()
    return found


def blocks_of(files: Sequence[RawFile]) -> list[pa.Table]:
    """Return blocks of a dataset, each for one task to read.

    A block is a table with a row for each file: its number and the fields of `RawFile`. A file has a block of its own,
    unless there are many small ones; then a block has several neighbours, because otherwise the overhead of tasks would
    dominate.
    """
    most, blocks, rows, size = ceil(len(files) / FILES_ALONE), [], [], 0
    for number, file in enumerate(files):
        rows.append({"number": number, **file._asdict()})
        size += file.size
        if size >= BLOCK_BYTES or len(rows) == most or number == len(files) - 1:
            blocks.append(pa.Table.from_pylist(rows))
            rows, size = [], 0
    return blocks


def list_files(storage: Storage, prepared: Path) -> tuple[str, list[Listed]]:
    """List files as `Storage.files()` does, without prepared folders and the staging directories beside them.

    Both may lie below a source's path. Those of `prepared` are left out, and also those of other settings.

    Returns:
        The root folder and the files.

    Raises:
        DataError: the pattern is invalid.
        OSError: the path cannot be listed, or nothing of this name exists.
    """
    root, listed, paths = storage.files()
    others = (path.rpartition("/")[0] for path in paths if path.endswith(f"/{_PREPARED[0]}"))
    made = tuple(f"{folder}/" for folder in others if all(f"{folder}/{name}" in paths for name in _PREPARED))
    if "://" not in root:
        inside = below(os.path.realpath(root), os.path.realpath(prepared))  # whichever links they are named by
        made += tuple(f"{root.rstrip('/')}/{inside}{end}" for end in ("/", ".partial-"))
    return root, [f for f in listed if not f.path.startswith(made) and not _PARTIAL.search(below(root, f.path))]


def _of_source(name: str, source: SourceSpec, subfolders: list[str] | None, prepared: Path) -> list[RawFile]:
    """Return the files of one source, of its given or detected format.

    Args:
        name: the name of the source.
        source: the settings of the source.
        subfolders: the subfolders to read; None for all that exist.
        prepared: the prepared folder, which is left out.

    Raises:
        DataError: the source or a subfolder is missing or has no file of the format, or the settings do not fit the
            format.
    """
    what = f"source {name}"
    storage = Storage(source.path)
    try:
        root, listed = list_files(storage, prepared)
    except FileNotFoundError as e:
        fix = "correct data.sources, or make sample text: mhmoe data sample data/sample"
        raise DataError(what, one_line(e), fix) from e
    except OSError as e:
        raise DataError(what, f"{source.path} cannot be listed: {one_line(e)}", "correct data.sources") from e
    if not listed:
        raise DataError(what, f"there is no file below {source.path}", "correct data.sources")
    format = source.format or _detect(what, source, listed)
    try:
        source.check_format(format)
    except ValueError as e:
        raise DataError(what, str(e), f"take the key out of data.sources.{name}") from e
    if format == "redpajama-v2":
        found = _redpajama_v2(what, source.filters or FilterSpec(), listed)
    elif format == "huggingface":
        found = _huggingface(what, storage, root, listed)
    else:
        found = _by_suffix(source, storage, root, format, listed)
    files = [RawFile(f"{name}/{sub}", path, size, format) for sub, (path, size) in found]
    if not files:
        fix = "correct its path, format or filters, or name its files by a pattern with *"
        raise DataError(what, f"nothing below {source.path} is a file of format {format}", fix)
    expected = subfolders
    if subfolders is None and format in SUFFIXES:
        expected = sorted({subfolder_at(root, path) for path, _ in listed} - {WHOLE})
    filled = {file.domain for file in files}
    for sub in expected or ():
        if f"{name}/{sub}" not in filled:
            fix = "remove the folder, or correct data.sources"
            raise DataError(f"{what}/{sub}", f"{root} has no file of format {format} for it", fix)
    wanted = [file for file in files if subfolders is None or subfolder_of(file.domain) in subfolders]
    _check_names(what, wanted)
    return wanted


def _check_names(what: str, files: list[RawFile]) -> None:
    """Check that the names of files are UTF-8: local names may be any bytes, but pyarrow and JSON accept only text.

    Raises:
        DataError: a name is not UTF-8.
    """
    for file in files:
        named = file.path.encode(errors="backslashreplace").decode()
        if named != file.path:
            raise DataError(what, f"the name of {named} is not UTF-8", "rename it")


def _detect(what: str, source: SourceSpec, listed: list[Listed]) -> Format:
    names = {path.rpartition("/")[2] for path, _ in listed}
    if any(NAME.search(path) for path, _ in listed):
        return "redpajama-v2"
    if names & {_STATE, _SPLITS}:
        return "huggingface"
    seen: list[Format] = [format for format, ends in SUFFIXES.items() if any(n.endswith(ends) for n in names)]
    if len(seen) > 1 and "text" in seen:  # a README or a licence beside the data
        seen.remove("text")
    if len(seen) == 1:
        return seen[0]
    if seen:
        why, fix = f"{source.path} holds files of formats {' and '.join(seen)}", "name one as its format"
    else:
        why = f"{source.path} holds no file ending in {', '.join(sum(SUFFIXES.values(), ()))}"
        fix = "correct its path, or name its files by a pattern and their format"
    raise DataError(what, why, fix)


def subfolder_at(root: str, path: str) -> str:
    """Return the subfolder of a file that was found below a root, or WHOLE if it lies in the root itself."""
    first, slash, _ = below(root, path).partition("/")
    return first if slash else WHOLE


def _by_suffix(
    source: SourceSpec, storage: Storage, root: str, format: Format, listed: list[Listed]
) -> Iterator[tuple[str, Listed]]:
    """Yield the subfolder and listing of each file with a suffix of the format.

    If the format is given and the source's path is a pattern or a single file, files are taken whatever their suffix.
    """
    named = source.format is not None and (len(listed) == 1 or storage.is_pattern)
    for file in listed:
        if named or file.path.endswith(SUFFIXES[format]):
            yield subfolder_at(root, file.path), file


def _huggingface(what: str, storage: Storage, root: str, listed: list[Listed]) -> Iterator[tuple[str, Listed]]:
    """Yield the data files that each `state.json` names; of a dictionary of splits, those of the split `train`.

    Raises:
        DataError: there is no split `train`, or a `state.json` cannot be used.
    """
    sizes = dict(listed)
    split_of = {path.rpartition("/")[0] for path in sizes if path.endswith(f"/{_SPLITS}")}
    datasets = sorted(path.rpartition("/")[0] for path in sizes if path.endswith(f"/{_STATE}"))
    for folder in split_of:
        if f"{folder}/train" not in datasets:
            fix = "let its path name the folder of one split"
            raise DataError(what, f"{folder} has no split named train", fix)
    for folder in datasets:
        above = folder.rpartition("/")[0]
        if above in split_of and folder != f"{above}/train":
            continue
        whole = above if above in split_of else folder
        for name in _data_files(what, storage, f"{folder}/{_STATE}"):
            yield subfolder_at(root, f"{whole}/{name}"), Listed(f"{folder}/{name}", sizes.get(f"{folder}/{name}", 0))


def _data_files(what: str, storage: Storage, path: str) -> list[str]:
    try:
        with storage.open(path) as stream:
            state = json.loads(stream.read())
        if state.get("_indices_data_files"):
            raise DataError(what, f"{path} selects rows through an index", "save it after flatten_indices()")
        return [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(what, f"{path} cannot be read", "save the dataset again with save_to_disk") from e


def _redpajama_v2(what: str, filters: FilterSpec, listed: list[Listed]) -> Iterator[tuple[str, Listed]]:
    there = {path for path, _ in listed}
    missing = []
    for file in listed:
        match = NAME.search(file.path)
        if match is None or match[3] not in filters.buckets or match[2] not in (filters.languages or [match[2]]):
            continue
        missing += [path for path in Beside.of(file.path).needed(filters) if path not in there]
        yield match[2], file
    if missing:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise DataError(what, f"{missing[0]} is not there{more}", "download it, or take out the filter that needs it")
