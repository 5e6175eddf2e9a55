"""Survey of all raw files of a spec: Ray Data reads them in parallel and sums their statistics, problems and copies.

The result depends on the files only, not on the number of tasks. Each document has an entry (copies.py), by which
duplicates are found. The entries stay in Ray's object store, which spills them to disk; the driver has only sums.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from mhmoe_ray.data import domains
from mhmoe_ray.data.domains import subfolder_of
from mhmoe_ray.data.images.annotations import require_image_packages, unpack
from mhmoe_ray.data.images.files import image_size
from mhmoe_ray.data.inspect.copies import ENTRY_DTYPE, Copies, count_copies, partition_entries, text_hash
from mhmoe_ray.data.inspect.figures import DomainSurvey, Figures, Finding, TextLocation
from mhmoe_ray.data.inspect.result import Survey, SurveyRequest
from mhmoe_ray.data.inspect.textrules import TextView, any_token_pattern, broken_rules
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.sources import Document, FileReader, RawFile, file_blocks, find_files
from mhmoe_ray.data.tokenizer import END_OF_TEXT, DocumentEncoder, find_boundaries, read_given_tokenizer, unknown_token
from mhmoe_ray.ray_compat import block_bundles
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import Location

# The encoder gets texts in batches; a batch ends with the document that reaches either limit.
DOCUMENTS_PER_CALL = 64
CHARACTERS_PER_CALL = 1_000_000
ENTRIES_PER_ARRAY = 1 << 18


class SurveyEncoder(NamedTuple):
    """Encoding function and special tokens of a tokenizer."""

    encode: Callable[[Sequence[str]], list[list[int]]]
    """Function that returns the token ids of texts without start tokens, as in preparation if the tokenizer has the
    boundary tokens that preparation needs."""
    special: list[str]
    """Special tokens, which lint looks for in texts."""
    unknown: int | None
    """Id of the unknown token, if the tokenizer has one."""


@lru_cache(maxsize=2)
def open_encoder(path: Location, pattern: str | None) -> SurveyEncoder:
    """Return the encoder of a tokenizer file that `read_given_tokenizer` accepts; a process caches the last two."""
    # The encoder is cached, because loading a large vocabulary takes longer than reading a small file.
    tokenizer = read_given_tokenizer(path, pattern)
    documents = DocumentEncoder(tokenizer) if find_boundaries(tokenizer) else None

    def encode(texts: Sequence[str]) -> list[list[int]]:
        if documents:
            return [ids for _, *ids in documents.encode(texts)]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return SurveyEncoder(encode, special, unknown_token(tokenizer))


def survey_file(
    number: int, file: RawFile, spec: DataSpec, tokenizer: Location | None, rules: bool
) -> Iterator[np.ndarray | DomainSurvey]:
    """Yield arrays of `ENTRY_DTYPE` with an entry for each document of a file, then the survey of the file.

    `number` is the file's number in the entries. Without a tokenizer, no tokens are counted. `rules` decides whether
    texts are checked against textrules.py.
    """
    survey, entries = DomainSurvey(), []
    folder_language = domains.language_of_folder(subfolder_of(file.domain))
    encoder = open_encoder(tokenizer, spec.tokenizer_pattern) if tokenizer else None
    special = any_token_pattern(encoder.special if encoder else [END_OF_TEXT])
    reader = FileReader(file, spec)
    for document, ids in _encode_documents(_read_documents(reader, survey), encoder):
        text, location = document.text, TextLocation(file.path, document.line)
        words, size = text.split(), len(text.encode())
        record_language = domains.language_of_record(document.language)
        figures = survey.languages.setdefault(record_language or folder_language, Figures())
        tokens = None if ids is None else len(ids)
        held_out = is_validation(document.image_hash or text, spec.validation_fraction)
        if document.image is not None:
            figures.images.add_image(len(document.image), *image_size(document.image))
            if document.annotation is not None:
                figures.images.add_annotation(unpack(document.annotation))
            # Two documents with images are copies only if their images and their texts are equal, so the hash includes
            # that of the image. An image alone has no words.
            hashed_words, stored_size = [*words, str(document.image_hash)], size + len(document.image)
        else:
            hashed_words, stored_size = words, size
        entries.append((text_hash(hashed_words), number, document.line, stored_size))
        if text:
            figures.add_document(text, size, len(words), tokens, held_out, location)
        else:
            figures.documents += 1
            figures.held_out += held_out
        if ids is not None and encoder is not None and encoder.unknown is not None:
            figures.unknown += ids.count(encoder.unknown)
        if rules and text:
            view = TextView(text, words, record_language, folder_language, special)
            for rule, evidence in broken_rules(view).items():
                survey.findings.setdefault(rule, Finding()).add_examples(1, [(location, evidence)])
        # Entries are yielded in arrays of limited size, so that the memory of a task stays bounded even for a large
        # file.
        if len(entries) == ENTRIES_PER_ARRAY:
            yield np.array(entries, ENTRY_DTYPE)
            entries = []
    survey.add_file(file.size, reader.tally)
    if entries:
        yield np.array(entries, ENTRY_DTYPE)
    yield survey


def _read_documents(reader: FileReader, survey: DomainSurvey) -> Iterator[Document]:
    """Yield the documents of a file, and add the items that could not be read to the survey's findings."""
    for item in reader:
        if isinstance(item, Document):
            yield item
        else:
            finding = survey.findings.setdefault(item.reason, Finding())
            finding.add_examples(1, [(TextLocation(item.path, item.line), item.detail)])


def _encode_documents(
    documents: Iterator[Document], encoder: SurveyEncoder | None
) -> Iterator[tuple[Document, list[int] | None]]:
    if encoder is None:
        yield from ((document, None) for document in documents)
        return
    while batch := list(_take_batch(documents)):
        yield from zip(batch, encoder.encode([document.text for document in batch]), strict=True)


def _take_batch(documents: Iterator[Document]) -> Iterator[Document]:
    """Yield `DOCUMENTS_PER_CALL` documents, or fewer with more than `CHARACTERS_PER_CALL` characters."""
    characters = 0
    for document in islice(documents, DOCUMENTS_PER_CALL):
        yield document
        # Images count as well, because the memory of a batch must stay bounded.
        characters += len(document.text) + len(document.image or b"")
        if characters > CHARACTERS_PER_CALL:
            return


PARTITION_BYTES = 4 << 30
"""Bytes of raw files for each partition of the entries. With documents of 500 stored bytes, a partition has 8 million
entries, which are 160 MB."""
MAX_PARTITIONS = 4096
PROGRESS_LINES = 10


def survey(request: SurveyRequest, partition_bytes: int = PARTITION_BYTES) -> Survey:
    """Survey all raw files that a request names on the running Ray cluster, and print the progress.

    Missing sources or an unusable tokenizer are a DataError.
    """
    # Open the tokenizer here too, so that an unusable one is reported before any task starts.
    if request.tokenizer:
        open_encoder(request.tokenizer, request.data.tokenizer_pattern)
    require_image_packages(request.data.sources.values())
    ray.data.DataContext.get_current().enable_progress_bars = False
    files = find_files(request.data)
    total_bytes = sum(file.size for file in files)
    partitions = min(MAX_PARTITIONS, 1 + total_bytes // partition_bytes)
    print(f"{SurveyRequest.kind}: reading {len(files):,} files, {total_bytes / 1e6:,.1f} MB", flush=True)
    read = partial(_read_file, request=request, partitions=partitions)
    blocks = ray.data.from_arrow(file_blocks(files)).flat_map(read, compute=_task_pool())

    result, block_refs, file_count = Survey(tokenized=request.tokenizer is not None), [], 0
    for bundle in block_bundles(blocks):
        for ref in bundle.block_refs:
            block_refs.append(ref)
            for row in _partition_rows(ray.get(ref), _FILE_SURVEY).to_pylist():
                file_survey = pickle.loads(row["data"])
                result.domains.setdefault(row["domain"], DomainSurvey())
                result.domains[row["domain"]] += file_survey
                file_count += 1
                tenth, previous_tenth = (n * PROGRESS_LINES // len(files) for n in (file_count, file_count - 1))
                if tenth > previous_tenth:
                    print(f"{SurveyRequest.kind}: read {file_count:,} of {len(files):,} files", flush=True)
    documents = sum(domain.all_figures.documents for domain in result.domains.values())
    print(f"{SurveyRequest.kind}: looking for copies among {documents:,} documents", flush=True)
    for copies in _count_partitions(block_refs, partitions, files):
        result.copies += copies
    # Files are finished in any order. Sorting the domains makes the result independent of that order.
    result.domains = dict(sorted(result.domains.items()))
    return result


def _task_pool() -> ray.data.TaskPoolStrategy:
    # A local cluster may declare more CPUs than the machine has cores, and starting a process for each would take
    # longer than reading a few files.
    nodes, cores = [node for node in ray.nodes() if node["Alive"]], os.cpu_count()
    has_excess_cpus = len(nodes) == 1 and cores is not None and nodes[0]["Resources"].get("CPU", 0) > cores
    return ray.data.TaskPoolStrategy(cores if has_excess_cpus else None)


MAX_BLOCKS = 1000
"""Number of blocks of Ray Data that one task may get as arguments."""

_FILE_SURVEY = -1


def _read_file(row: dict[str, Any], *, request: SurveyRequest, partitions: int) -> Iterator[dict[str, Any]]:
    """Survey one raw file in a task of Ray Data that yields rows with the columns `partition`, `domain` and `data`.

    `data` is the entries of one partition as bytes, or, with `_FILE_SURVEY` as partition, a pickled `DomainSurvey`.
    """
    file = RawFile.from_row(row)
    for item in survey_file(row["number"], file, request.data, request.tokenizer, request.rules):
        if isinstance(item, DomainSurvey):
            yield {"partition": _FILE_SURVEY, "domain": file.domain, "data": pickle.dumps(item)}
        else:
            for partition, entries in partition_entries(item, partitions):
                yield {"partition": partition, "domain": file.domain, "data": entries.tobytes()}


def _partition_rows(block: pa.Table, partition: int) -> pa.Table:
    return block.filter(pc.equal(block["partition"], partition))


def _count_partitions(blocks: list[Any], partitions: int, files: list[RawFile]) -> Iterator[Copies]:
    """Count the duplicates in each partition of `_read_file`'s rows; `files` are in the order of their numbers."""
    # A single partition is counted by one task, because a shuffle would take longer to start than the counting takes.
    # With several partitions, or more blocks than one task should get as arguments, Ray Data shuffles the blocks.
    count = partial(_count_partition, domains=[f.domain for f in files], paths=[f.path for f in files])
    if partitions == 1 and len(blocks) <= MAX_BLOCKS:
        count_task = ray.remote(_count_blocks).options(num_cpus=1)
        pickled_copies = ray.get(count_task.remote(count, *blocks))["data"].to_pylist()
    else:
        entries = ray.data.from_arrow_refs(blocks).filter(expr=f"partition != {_FILE_SURVEY}")
        partition_groups = entries.groupby("partition", num_partitions=partitions)
        pickled_copies = [row["data"] for row in partition_groups.map_groups(count, batch_format="pyarrow").iter_rows()]
    return map(pickle.loads, pickled_copies)


def _count_blocks(count: Callable[[pa.Table], pa.Table], *blocks: pa.Table) -> pa.Table:
    return count(pa.concat_tables(_partition_rows(block, 0) for block in blocks))


def _count_partition(rows: pa.Table, *, domains: list[str], paths: list[str]) -> pa.Table:
    entries = np.frombuffer(b"".join(rows["data"].to_pylist()), ENTRY_DTYPE)
    return pa.table({"data": [pickle.dumps(count_copies(entries, domains, paths))]})
