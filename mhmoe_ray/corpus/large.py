"""The large sample: over 100 MB of text in nearly 40 languages, from packages of Debian and PyPI.

    DIR/redpajama/<domain>        English, in folders with RedPajama's names
    DIR/multilingual/<language>   translations of manuals
    DIR/licenses                  the licence text that each package contains

The text is not that of RedPajama. The `meta` of each record names its source, language and licence.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mhmoe_ray.corpus.clean import Cleaner
from mhmoe_ray.corpus.fetch import fetch_package, read_members
from mhmoe_ray.corpus.packages import PACKAGES, Package, file_language
from mhmoe_ray.corpus.readers import CorpusDocument
from mhmoe_ray.corpus.sample import PackageSample, SampleSummary
from mhmoe_ray.corpus.shards import TextShardWriter
from mhmoe_ray.corpus.small import english_records, remove_sample
from mhmoe_ray.errors import DataError

GOAL_BYTES, GOAL_LANGUAGES = 100_000_000, 15
GOAL_LANGUAGE_BYTES = 1_000_000
"""Smallest number of bytes of text with which a language counts toward `GOAL_LANGUAGES`."""
MIN_LANGUAGE_BYTES = 50_000
"""Bytes of text below which a language is left out: a few pages of a translation teach little."""
_TRANSLATIONS = "multilingual/"


@dataclass
class LargeSummary(SampleSummary):
    """Summary of a large text sample on disk.

    Attributes:
        documents: number of documents by folder below DIR.
        bytes: bytes of text by folder below DIR.
    """

    documents: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def describe_shortfall(self) -> str | None:
        """Return a clause for the user about how far the sample misses its goal; None if it reaches the goal."""
        total_bytes = sum(self.bytes.values())
        translation_count = sum(
            size >= GOAL_LANGUAGE_BYTES for name, size in self.bytes.items() if name.startswith(_TRANSLATIONS)
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
) -> LargeSummary:
    """Write the large sample into `folder`, in place of an earlier one, and return its summary.

    It has the English text of the small sample, and the packages' texts in all languages. A package that cannot be
    downloaded or read is left out with a printed warning, and so is a language with less than `MIN_LANGUAGE_BYTES` of
    text. Packages in `cache` are not downloaded again. A missing package of the `sample` extra, or a folder that cannot
    be written, is a DataError.
    """
    english_text, sample = english_records(), _LargeSample(folder, cache, print_line)
    try:
        remove_sample(folder)
        # English text is added first, because the cleaner finds untranslated text in translations by comparison with
        # the English originals.
        for domain, records in english_text.items():
            for record in records:
                sample.add_document(domain, CorpusDocument("", [record["text"]]), record["meta"])
        for package in packages:
            sample.attempt(partial(sample.add_package, package))
        sample.finish()
    except OSError as e:
        raise DataError(f"data sample {folder}", e.strerror or str(e), "name folders you can write") from e
    return sample.summary


class _LargeSample(PackageSample):
    """A large sample that is being written, with the open shards of all domains."""

    def __init__(self, folder: Path, cache: Path, print_line: Callable[[str], None]) -> None:
        super().__init__(folder, cache, print_line)
        self.summary: LargeSummary = LargeSummary()
        self._cleaner, self._writers = Cleaner(), dict[str, TextShardWriter]()

    def add_document(self, domain: str, document: CorpusDocument, meta: dict[str, Any]) -> int:
        """Clean a document, write its text and return the text's bytes; 0 if the cleaner drops the document."""
        text = self._cleaner.clean(document, domain, is_translation=meta["language"] != "en")
        if text is None:
            return 0
        self._writers.setdefault(domain, TextShardWriter(self.folder / domain)).add({"text": text, "meta": meta})
        return len(text.encode())

    def add_package(self, package: Package) -> None:
        """Write the documents of a package.

        DataError: the package cannot be downloaded, is damaged, or its files have no text after cleaning. None of its
        text is written then.
        """
        fetched, name = fetch_package(package, self.cache), package.plain_name
        license_file = re.compile(
            rf"usr/share/doc/{re.escape(name)}/copyright|[^/]+\.dist-info/(licenses/)?LICEN[CS]E.*"
        )
        # The whole package is read before any of its text is written, because damage may show only at the package's
        # end.
        documents, license_texts = list[tuple[str, str, CorpusDocument]](), list[bytes]()
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
            domain = f"redpajama/{package.domain}" if language == "en" else _TRANSLATIONS + language
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
        self.write_license(package, b"\n".join(license_texts))
        self.summary.downloaded += fetched.downloaded_bytes
        count, size = sum(map(bool, text_sizes)), sum(text_sizes)
        self.print_line(f"{name} {fetched.version}: {count:,} documents, {size / 1e6:.1f} MB")

    def finish(self) -> None:
        """Finish the shards, and leave out languages with too little text."""
        for name, writer in sorted(self._writers.items()):
            if name.startswith(_TRANSLATIONS) and writer.text_bytes < MIN_LANGUAGE_BYTES:
                writer.discard()
            else:
                writer.close()
                self.summary.documents[name], self.summary.bytes[name] = writer.count, writer.text_bytes
