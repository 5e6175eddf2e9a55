"""Data sets of the Hugging Face hub as a file system: `hf://datasets/ORGANIZATION/NAME@REVISION/path`.

A file is downloaded when it is opened, into the hub's own cache (`HF_HOME`). With `HF_HUB_OFFLINE=1`, or without a
network, the files in this cache are the data set. Only Parquet and JSON lines are listed, compressed or not.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from pyarrow import fs

_DATA_FILE = re.compile(r"\.(parquet|jsonl)(\.\w+)?$")
_PATH = re.compile(r"datasets/(?P<repository>[^/@]+/[^/@]+)@(?P<revision>[^/]+)(?:/(?P<file>.*))?")


def open_hub(_scheme: str, bucket: str, _query: str) -> tuple[fs.FileSystem, str]:
    """Return pyarrow's view of the hub; the "bucket" of its URIs is the word `datasets`."""
    if bucket != "datasets":
        raise OSError("it is no data set of the hub: write hf://datasets/ORGANIZATION/NAME@REVISION")
    return fs.PyFileSystem(fs.FSSpecHandler(HubDatasets())), bucket


class HubDatasets(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The data sets of the hub, with the methods that reading a source needs."""

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        repository, revision, name = _split(path)
        files = list_files(repository, revision)
        if name in files:
            return {"name": path, "size": files[name], "type": "file"}
        if any(file.startswith(f"{name}/" if name else "") for file in files):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(2, "the data set has no Parquet or JSON lines there", path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        repository, revision, folder = _split(path)
        prefix = f"{folder}/" if folder else ""
        files = [file for file in list_files(repository, revision) if file.startswith(prefix)]
        names = dict.fromkeys(file.removeprefix(prefix).partition("/")[0] for file in files)
        entries = [self.info(f"{path.rstrip('/')}/{name}") for name in names]
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> BinaryIO:
        repository, revision, file = _split(path)
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision)).open("rb")


def _split(path: str) -> tuple[str, str, str]:
    """Return the repository, the revision and the path within it."""
    match = _PATH.fullmatch(path.strip("/"))
    if match is None:
        # Without a revision, a later preparation might read other files, and nobody would notice.
        raise OSError(f"{path} names no data set with its revision: write datasets/ORGANIZATION/NAME@REVISION")
    return match["repository"], match["revision"], match["file"] or ""


@lru_cache(maxsize=16)
def list_files(repository: str, revision: str) -> dict[str, int]:
    """Return the size of each file with data; a data set that cannot be listed is an OSError."""
    try:
        entries = HfApi().list_repo_tree(repository, recursive=True, repo_type="dataset", revision=revision)
        sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    except GatedRepoError as e:
        raise OSError("the hub asks for its terms to be accepted: accept them and set HF_TOKEN") from e
    except (RepositoryNotFoundError, RevisionNotFoundError) as e:
        raise OSError("the hub has no such data set or revision, or it is private: correct it, or set HF_TOKEN") from e
    except OSError:
        sizes = _cached_sizes(repository, revision)
    return {path: size for path, size in sizes.items() if _DATA_FILE.search(path)}


def _cached_sizes(repository: str, revision: str) -> dict[str, int]:
    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as e:
        reason = "the hub cannot be reached, and its cache has no such data set: check the network and HF_HUB_OFFLINE"
        raise OSError(reason) from e
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
