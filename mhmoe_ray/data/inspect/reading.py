"""One raw file: its figures and findings, and an entry for each document."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.domains import subfolder_of
from mhmoe_ray.data.inspect import languages
from mhmoe_ray.data.inspect.copies import ENTRY, hash_of
from mhmoe_ray.data.inspect.figures import DomainSurvey, Figures, Finding, Place
from mhmoe_ray.data.inspect.textrules import any_of, broken_by
from mhmoe_ray.data.prepare.held_out import is_validation
from mhmoe_ray.data.sources import Document, RawFile, Reading
from mhmoe_ray.data.tokenizer import END_OF_TEXT, DocumentEncoder, find_boundaries, read_given, unknown_token
from mhmoe_ray.spec import DataSpec

DOCUMENTS_PER_CALL = 64
CHARACTERS_PER_CALL = 1_000_000
ENTRIES_AT_ONCE = 1 << 18


class Encoder(NamedTuple):
    encode: Callable[[Sequence[str]], list[list[int]]]
    """Token ids of texts alone: as preparing finds them, where the tokenizer is one to prepare with."""
    special: list[str]
    """Tokens that a text may spell out."""
    unknown: int | None
    """The id of its token for what it does not know."""


@lru_cache(maxsize=2)
def open_encoder(path: Path, pattern: str | None) -> Encoder:
    """Kept open within a process, since a large vocabulary takes longer to load than a small file to read.

    Raises:
        DataError: as `read_given`.
    """
    tokenizer = read_given(path, pattern)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    documents = DocumentEncoder(tokenizer) if find_boundaries(tokenizer) else None

    def encode(texts: Sequence[str]) -> list[list[int]]:
        if documents:
            return [ids for _, *ids in documents.encode(texts)]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return Encoder(encode, special, unknown_token(tokenizer))


class Whole(NamedTuple):
    """The last of a file."""

    survey: DomainSurvey


def survey_file(
    number: int, file: RawFile, spec: DataSpec, tokenizer: Path | None, rules: bool
) -> Iterator[np.ndarray | Whole]:
    """Entries of documents as they come, then what the whole file adds to its domain.

    Args:
        number: of the file, for its entries.
        file: one of `find_files(spec)`.
        spec: the data section it was found by.
        tokenizer: counts tokens where it is given.
        rules: whether texts are held against textrules.py.
    """
    survey, entries = DomainSurvey(), []
    folder = languages.of_folder(subfolder_of(file.domain))
    encoder = open_encoder(tokenizer, spec.tokenizer_pattern) if tokenizer else None
    special = any_of(encoder.special if encoder else [END_OF_TEXT])
    reading = Reading(file, spec)
    for document, ids in _encoded(_documents(reading, survey), encoder):
        text, place = document.text, Place(file.path, document.line)
        words, size = text.split(), len(text.encode())
        own = languages.of_record(document.language)
        figures = survey.languages.setdefault(own or folder, Figures())
        tokens = None if ids is None else len(ids)
        figures.count(text, size, len(words), tokens, is_validation(text, spec.validation_fraction), place)
        if ids is not None and encoder is not None and encoder.unknown is not None:
            figures.unknown += ids.count(encoder.unknown)
        if rules:
            for rule, saw in broken_by(text, words, own, file.domain, special).items():
                survey.findings.setdefault(rule, Finding()).add(1, [(place, saw)])
        entries.append((hash_of(words), number, document.line, size))
        if len(entries) == ENTRIES_AT_ONCE:
            yield np.array(entries, ENTRY)
            entries = []
    survey.read(file.size, reading.tally)
    if entries:
        yield np.array(entries, ENTRY)
    yield Whole(survey)


def _documents(reading: Reading, survey: DomainSurvey) -> Iterator[Document]:
    for item in reading:
        if isinstance(item, Document):
            yield item
        else:
            finding = survey.findings.setdefault(item.reason, Finding())
            finding.add(1, [(Place(item.path, item.line), item.detail)])


def _encoded(documents: Iterator[Document], encoder: Encoder | None) -> Iterator[tuple[Document, list[int] | None]]:
    """Each document with its tokens."""
    if encoder is None:
        yield from ((document, None) for document in documents)
        return
    while batch := list(_some(documents)):
        yield from zip(batch, encoder.encode([document.text for document in batch]), strict=True)


def _some(documents: Iterator[Document]) -> Iterator[Document]:
    characters = 0
    for document in islice(documents, DOCUMENTS_PER_CALL):
        yield document
        characters += len(document.text)
        if characters > CHARACTERS_PER_CALL:
            return
