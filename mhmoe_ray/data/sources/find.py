"""Discovery of the raw files of a spec: the files of each source, their format, and the domain of each file.

The domain of a file is named after the folder directly below the source's path that contains the file, or in
RedPajama-V2 after the language of the file. Files directly in the source's path belong to the domain `all`, and so do
all images if the folders are classes.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa

from mhmoe_ray.data.domains import source_of, subfolder_of
from mhmoe_ray.data.shards.manifest import MANIFEST_FILE, QUARANTINE_FILE
from mhmoe_ray.data.sources.items import RawFile
from mhmoe_ray.data.sources.redpajama_v2 import DOCUMENTS_PATH, SidecarFiles
from mhmoe_ray.data.sources.storage import ListedFile, Storage, leaves_folder, relative_path
from mhmoe_ray.errors import DataError
from mhmoe_ray.parsing import parse_object
from mhmoe_ray.runs.directory import ATTEMPTS_FILE, SPEC_FILE
from mhmoe_ray.spec import DataSpec, FilterSpec, Format, SourceSpec
from mhmoe_ray.spec.formats import FORMATS
from mhmoe_ray.storage import Location, ObjectPath, explain_error, short_message

ROOT_SUBFOLDER = "all"
"""Subfolder in the domain of files that lie directly in the source's path."""

MAX_FILE_BLOCKS = 1000
"""Number of files up to which each is a separate block of the Ray dataset."""
BLOCK_BYTES = 4 << 20
"""Bytes of files from which a block is full."""

FINGERPRINT_BYTES = 4096
"""Bytes at a file's beginning that its fingerprint covers. Files that differ only later mostly differ in size, too."""

_OUTPUT_FILES = ((MANIFEST_FILE, QUARANTINE_FILE), (ATTEMPTS_FILE, SPEC_FILE))
"""Files by which a folder of prepared shards or a run is recognized: no other folder has both of a pair."""
_STAGING_DIRECTORY = re.compile(r"\.partial-[0-9a-f]{8}/")
_STATE_FILE, _SPLITS_FILE = "state.json", "dataset_dict.json"


def find_files(spec: DataSpec, sources: Collection[str] | None = None) -> list[RawFile]:
    """Return the raw files of a spec's sources, or of those named in `sources`, in an order that depends on names only.

    A source or a named subfolder that is missing or has no file of a known format is a DataError.
    """
    files = []
    for name in spec.sources:
        if sources is None or name in sources:
            files += _files_of_source(name, spec)
    return files


def source_errors(spec: DataSpec) -> list[DataError]:
    """Return the errors that `find_files` would raise for a spec's local sources; object stores are not checked."""
    errors = []
    for name, source in spec.sources.items():
        if "://" not in source.path:
            try:
                _files_of_source(name, spec)
            except DataError as e:
                errors.append(e)
    return errors


def fingerprints(spec: DataSpec, files: Sequence[RawFile]) -> dict[str, str]:
    """Return a fingerprint of each local source in `files`, which moving the files does not change.

    It is a hash over the relative paths, sizes and first bytes of the source's files, which are in the order of
    `find_files`. A source in an object store has none: its URI identifies it.
    """
    digests: dict[str, Any] = {}
    for name, source_files in itertools.groupby(files, lambda file: source_of(file.domain)):
        path = spec.sources[name].path
        if "://" in path:
            continue
        root, digests[name] = Storage(path).root(), hashlib.sha256()
        for file in source_files:
            # For a group of images, which may have millions of files, the hash covers all names but only the beginning
            # of the first file.
            first_bytes = "\0".join(file.members).encode()
            try:
                with Path(file.stored_paths[0]).open("rb") as stream:
                    first_bytes += stream.read(FINGERPRINT_BYTES)
            except OSError:
                # The reader of the file reports the loss, which `max_bad_files` may allow. Without its content, the
                # fingerprint covers the file's name and size.
                pass
            first_hash = hashlib.sha256(first_bytes).hexdigest()
            entry = f"{file.domain}\0{relative_path(root, file.path)}\0{file.size}\0{first_hash}\n"
            digests[name].update(entry.encode())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def version_hash(spec: DataSpec, files: Sequence[RawFile]) -> str:
    """Return a hash that changes when a file is written, added or removed, and when the chat template is written.

    It covers paths, sizes and modification times, and so also tells apart files of the same size and beginning. On an
    object store, it needs one listing. A failed listing or a missing template is an OSError.
    """
    digest = hashlib.sha256()
    for name, group in itertools.groupby(files, lambda file: source_of(file.domain)):
        source_files = list(group)
        stored_files = [(file, path) for file in source_files for path in file.stored_paths]
        times = Storage(spec.sources[name].path).modification_times([path for _, path in stored_files])
        for (file, path), modification_time in zip(stored_files, times, strict=True):
            digest.update(f"{file.domain}\0{path}\0{file.size}\0{modification_time}\n".encode())
    if spec.chat_template is not None:
        digest.update(f"{spec.chat_template.stat().st_mtime}\n".encode())
    return digest.hexdigest()


_FILE_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("domain", pa.string()),
        ("path", pa.string()),
        ("size", pa.int64()),
        ("format", pa.string()),
        ("members", pa.list_(pa.string())),
    ]
)


def file_blocks(files: Sequence[RawFile]) -> list[pa.Table]:
    """Group files into the blocks of a Ray dataset, each a table of file numbers and `RawFile` fields for one task.

    Each file has its own block unless there are more than `MAX_FILE_BLOCKS`; then small neighbouring files share one.
    """
    # With a task for each of many small files, the overhead of tasks would dominate.
    files_per_block, blocks, rows, size = ceil(len(files) / MAX_FILE_BLOCKS), [], [], 0
    for number, file in enumerate(files):
        rows.append({"number": number, **file._asdict()})
        size += file.size
        if size >= BLOCK_BYTES or len(rows) == files_per_block or number == len(files) - 1:
            blocks.append(pa.Table.from_pylist(rows, _FILE_SCHEMA))
            rows, size = [], 0
    return blocks


def list_files(storage: Storage, prepared: Location) -> tuple[str, list[ListedFile]]:
    """Return the root and the files of `Storage.list_files` without runs, prepared folders and staging directories.

    All may be below a source's path, and those of other preparations are recognized by their files or names. An
    invalid pattern is a DataError, and a path that cannot be listed or does not exist an OSError.
    """
    root, files, paths = storage.list_files()
    excluded_prefixes = tuple(
        path.removesuffix(name)
        for name, other_name in _OUTPUT_FILES
        for path in paths
        if path.endswith(f"/{name}") and path.removesuffix(name) + other_name in paths
    )
    if isinstance(prepared, ObjectPath):
        excluded_prefixes += tuple(f"{str(prepared).partition('?')[0]}{end}" for end in ("/", ".partial-"))
    elif "://" not in root:
        # Both paths are resolved, since they may contain different links to the same folder.
        prepared_path = relative_path(os.path.realpath(root), os.path.realpath(prepared))
        excluded_prefixes += tuple(f"{root.rstrip('/')}/{prepared_path}{end}" for end in ("/", ".partial-"))
    return root, [
        f
        for f in files
        if not f.path.startswith(excluded_prefixes) and not _STAGING_DIRECTORY.search(relative_path(root, f.path))
    ]


_SAMPLE_ARGUMENTS = {
    "second_image": "data/questions --questions",
    "objects": "data/scenes --scenes",
    "class": "data/scenes --scenes",
    "image": "data/pictures --pictures",
    "text": "data/sample",
}
"""Arguments with which `mhmoe data sample` makes data with a column; the first column of a spec counts."""


def _files_of_source(name: str, spec: DataSpec) -> list[RawFile]:
    """Return the files of one source that have its given or detected format.

    If the source has fixed shares in all phases, only the subfolders with a share are read. A missing source, subfolder
    or file, settings that do not fit the format, and a name that is not UTF-8 are a DataError.
    """
    source, subfolders, subject = spec.sources[name], spec.named_subfolders(name), f"source {name}"
    storage = Storage(source.path)
    try:
        root, listed_files = list_files(storage, spec.prepared)
    except FileNotFoundError as e:
        columns = {column for other_source in spec.sources.values() for column in other_source.sample_columns}
        arguments = next(value for column, value in _SAMPLE_ARGUMENTS.items() if column in columns)
        if "/data/large/" in source.path:
            arguments = "--large data/large"
        fix = f"correct its path, or make sample data: mhmoe data sample {arguments}"
        raise DataError(subject, short_message(e), fix) from e
    except OSError as e:
        reason, fix = explain_error(e, "correct data.sources")
        raise DataError(subject, f"{source.path} cannot be listed: {reason}", fix) from e
    if not listed_files:
        raise DataError(subject, f"there is no file below {source.path}", "correct data.sources")
    format = source.format or _detect_format(subject, source, listed_files)
    try:
        source.check_format(format)
    except ValueError as e:
        raise DataError(subject, str(e), f"remove the key from data.sources.{name}") from e
    if format == "redpajama-v2":
        selected_files = _redpajama_v2_files(subject, storage, source.filters or FilterSpec(), listed_files)
    elif format == "huggingface":
        selected_files = _huggingface_files(subject, storage, root, listed_files)
    else:
        selected_files = _files_by_suffix(source, storage, root, format, listed_files)
    filled_subfolders = None
    if format == "images":
        image_files = list(selected_files)
        if "class" in source.sample_columns:
            # The folders of classes do not become domains: there may be thousands of classes, and a class is not meant
            # to have a weight in the mixture.
            filled_subfolders = {subfolder for subfolder, _ in image_files}
            image_files = [(ROOT_SUBFOLDER, file) for _, file in image_files]
        files = list(_image_folders(name, root, image_files))
    else:
        files = [RawFile(f"{name}/{subfolder}", path, size, format) for subfolder, (path, size) in selected_files]
    if not files:
        fix = "correct its path, format or filters, or name its files by a pattern with *"
        raise DataError(subject, f"nothing below {source.path} is a file of format {format}", fix)
    # Without this check, a subfolder that has no files of the format would be missing from the training without notice.
    domains = {subfolder_of(file.domain) for file in files}
    for subfolder in spec.shared_subfolders(name):
        if subfolder not in domains:
            _refuse_empty_subfolder(subject, subfolder, root, format)
    # If all subfolders are read, each must have files of the format. Formats that are found by folders, and those whose
    # files name images in folders beside them, are not checked.
    if subfolders is None and FORMATS[format].suffixes and not FORMATS[format].has_image_folders:
        existing_subfolders = {subfolder_at(root, path) for path, _ in listed_files} - {ROOT_SUBFOLDER}
        for subfolder in sorted(existing_subfolders - (filled_subfolders or domains)):
            _refuse_empty_subfolder(subject, subfolder, root, format)
    requested_files = [file for file in files if subfolders is None or subfolder_of(file.domain) in subfolders]
    _check_names(subject, requested_files)
    return requested_files


def _refuse_empty_subfolder(subject: str, subfolder: str, root: str, format: Format) -> NoReturn:
    fix = "set the source's `format`, correct its path, or move this folder out of it"
    raise DataError(f"{subject}/{subfolder}", f"{root} has no file of format {format} for it", fix)


def _check_names(subject: str, files: list[RawFile]) -> None:
    # A local name may be any bytes, but pyarrow and JSON accept only text.
    for path in (path for file in files for path in file.stored_paths):
        printable_path = path.encode(errors="backslashreplace").decode()
        if printable_path != path:
            raise DataError(subject, f"the name of {printable_path} is not UTF-8", "rename it")


def _detect_format(subject: str, source: SourceSpec, listed_files: list[ListedFile]) -> Format:
    """Return the format that the names of a source's files show; none or several are a DataError."""
    names = {path.rpartition("/")[2] for path, _ in listed_files}
    if any(DOCUMENTS_PATH.search(path) for path, _ in listed_files):
        return "redpajama-v2"
    if names & {_STATE_FILE, _SPLITS_FILE}:
        return "huggingface"
    suffixes = {name: traits.suffixes for name, traits in FORMATS.items() if traits.is_recognized}
    formats = [name for name in suffixes if any(n.endswith(suffixes[name]) for n in names)]
    # A text file beside files of another format is a README or a licence, so the other format is the source's.
    if len(formats) > 1 and "text" in formats:
        formats.remove("text")
    if len(formats) == 1:
        return formats[0]
    if formats:
        reason, fix = f"{source.path} holds files of formats {' and '.join(formats)}", "name one as its format"
    else:
        reason = f"{source.path} holds no file ending in {', '.join(sum(suffixes.values(), ()))}"
        fix = "correct its path, or name its files by a pattern and their format"
    raise DataError(subject, reason, fix)


def subfolder_at(root: str, path: str) -> str:
    """Return the folder directly below `root` that a file is in, or ROOT_SUBFOLDER if it is in the root."""
    folder, slash, _ = relative_path(root, path).partition("/")
    return folder if slash else ROOT_SUBFOLDER


IMAGES_BYTES = 64 << 20
"""Bytes at which a group of images in one `RawFile` is full. Reading such a group takes some seconds."""


def _image_folders(name: str, root: str, image_files: Iterable[tuple[str, ListedFile]]) -> Iterator[RawFile]:
    """Yield the images of a source, in the order of paths, as groups of about `IMAGES_BYTES` in one subfolder."""
    for subfolder, group in itertools.groupby(image_files, lambda image_file: image_file[0]):
        folder = root if subfolder == ROOT_SUBFOLDER else f"{root.rstrip('/')}/{subfolder}"
        members, size = list[str](), 0
        for _, (path, image_bytes) in group:
            members.append(relative_path(folder, path))
            size += image_bytes
            if size >= IMAGES_BYTES:
                yield RawFile(f"{name}/{subfolder}", folder, size, "images", tuple(members))
                members, size = [], 0
        if members:
            yield RawFile(f"{name}/{subfolder}", folder, size, "images", tuple(members))


def _files_by_suffix(
    source: SourceSpec, storage: Storage, root: str, format: Format, listed_files: list[ListedFile]
) -> Iterator[tuple[str, ListedFile]]:
    """Yield the files whose names end in a suffix of the format, each with its subfolder.

    If the format is given and the source's path is a pattern or a single file, files with any suffix are taken.
    """
    takes_all = source.format is not None and (len(listed_files) == 1 or storage.is_pattern)
    for file in listed_files:
        # Cameras write suffixes in capitals, so those of images may be in either case.
        path = file.path.lower() if format == "images" else file.path
        if takes_all or path.endswith(FORMATS[format].suffixes):
            yield subfolder_at(root, file.path), file


def _huggingface_files(
    subject: str, storage: Storage, root: str, listed_files: list[ListedFile]
) -> Iterator[tuple[str, ListedFile]]:
    """Yield the Arrow files that the `state.json` of each dataset names, each with its subfolder.

    Of a dictionary of splits, only `train` is used; its absence or an unusable `state.json` is a DataError.
    """
    sizes = dict(listed_files)
    split_folders = {path.rpartition("/")[0] for path in sizes if path.endswith(f"/{_SPLITS_FILE}")}
    datasets = sorted(path.rpartition("/")[0] for path in sizes if path.endswith(f"/{_STATE_FILE}"))
    for folder in split_folders:
        if f"{folder}/train" not in datasets:
            fix = "set its path to the folder of one split"
            raise DataError(subject, f"{folder} has no split named train", fix)
    for folder in datasets:
        parent = folder.rpartition("/")[0]
        if parent in split_folders and folder != f"{parent}/train":
            continue
        # The files of a split `train` get the domain of the dataset's folder, one level above.
        dataset_folder = parent if parent in split_folders else folder
        # A missing data file gets size 0, and its reader will report the loss.
        for name in _data_files(subject, storage, f"{folder}/{_STATE_FILE}"):
            yield (
                subfolder_at(root, f"{dataset_folder}/{name}"),
                ListedFile(f"{folder}/{name}", sizes.get(f"{folder}/{name}", 0)),
            )


def _data_files(subject: str, storage: Storage, path: str) -> list[str]:
    """Return the data files that a `state.json` names; an index of rows or a file outside its folder is a DataError."""
    try:
        with storage.open(path) as stream:
            state = parse_object(stream.read())
        # An index selects or reorders rows without rewriting the data files, so the data files have other rows than the
        # dataset.
        if state.get("_indices_data_files"):
            raise DataError(subject, f"{path} selects rows through an index", "save it after flatten_indices()")
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(subject, f"{path} cannot be read", "save the dataset again with save_to_disk") from e
    if outside_name := next(filter(leaves_folder, names), None):
        reason = f"{path} names {outside_name!r}, which is outside of its folder"
        raise DataError(subject, reason, "save the dataset again with save_to_disk")
    return names


def _redpajama_v2_files(
    subject: str, storage: Storage, filters: FilterSpec, listed_files: list[ListedFile]
) -> Iterator[tuple[str, ListedFile]]:
    """Yield the files that the filters select, each with its language; a missing sidecar file is a DataError."""
    existing_paths = {path for path, _ in listed_files}
    unlisted_paths = []
    for file in listed_files:
        match = DOCUMENTS_PATH.search(file.path)
        if match is None or match[3] not in filters.buckets or match[2] not in (filters.languages or [match[2]]):
            continue
        unlisted_paths += [
            path
            for path in SidecarFiles.from_documents(file.path).required_paths(filters)
            if path not in existing_paths
        ]
        yield match[2], file
    if missing_paths := storage.missing_paths(unlisted_paths):
        more_text = f" (and {len(missing_paths) - 1:,} more)" if len(missing_paths) > 1 else ""
        raise DataError(
            subject, f"{missing_paths[0]} is not there{more_text}", "download it, or take out the filter that needs it"
        )
