"""Raw text for tests, in RedPajama's layout."""

import json
from pathlib import Path

import pyarrow as pa

WORDS = ("the moon rises over a quiet sea and every small boat turns home before night falls on us all").split()


def make_documents(name: str, count: int, words: int = 60) -> list[str]:
    """Return `count` distinct texts that begin with `name` and have about `words` words, the same at each call."""
    seed = sum(map(ord, name))

    def document_text(i: int) -> str:
        return " ".join(WORDS[(i * j * 7 + seed + j) % len(WORDS)] for j in range(words + i % 13))

    return [f"{name} {i}: {document_text(i + 1)}" for i in range(count)]


def write_lines(path: Path, lines: list[bytes]) -> None:
    """Write lines to a file and create its folder; the file is compressed if its suffix is .gz or .zst."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.output_stream(str(path)) as out:
        for line in lines:
            out.write(line + b"\n")


def write_documents(path: Path, texts: list[str]) -> None:
    """Write each text as a line of JSON, like RedPajama-1T; the file is compressed if its suffix is .gz or .zst."""
    write_lines(path, [json.dumps({"text": t, "meta": {"source": "test"}}, ensure_ascii=False).encode() for t in texts])


def write_corpus(folder: Path) -> dict[str, list[str]]:
    """Write JSON lines of the domains web/a, web/b and web/c, some of them compressed; return the texts by domain."""
    files = {
        "a/one.jsonl": make_documents("a-one", 40),
        "a/two.jsonl.zst": make_documents("a-two", 25),
        "b/three.jsonl.gz": make_documents("b-three", 30),
        "c/en_head_0000.json.gz.dedup.classifier.jsonl.zst": make_documents("c-four", 12),
    }
    texts_by_domain: dict[str, list[str]] = {}
    for name, domain_texts in files.items():
        write_documents(folder / name, domain_texts)
        texts_by_domain.setdefault(f"web/{name[0]}", []).extend(domain_texts)
    return texts_by_domain
