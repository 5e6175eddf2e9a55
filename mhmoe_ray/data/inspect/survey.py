"""Survey of all raw files of a spec: Ray Data reads them in parallel and sums their figures, findings and copies.

The result depends on the files only, not on how many tasks ran at once. Entries of documents stay in Ray's object
store, which spills them to disk; the driver holds only sums.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from mhmoe_ray.data import domains
from mhmoe_ray.data.domains import subfolder_of
from mhmoe_ray.data.inspect.copies import ENTRY, Copies, count_copies, deal, hash_of
from mhmoe_ray.data.inspect.figures import DomainSurvey, Figures, Finding, Place
from mhmoe_ray.data.inspect.result import Survey, SurveyRequest
from mhmoe_ray.data.inspect.textrules import any_of, broken_by
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.sources import Document, RawFile, Reading, blocks_of, find_files
from mhmoe_ray.data.tokenizer import END_OF_TEXT, DocumentEncoder, find_boundaries, read_given, unknown_token
from mhmoe_ray.ray_compat import block_bundles
from mhmoe_ray.spec import DataSpec

DOCUMENTS_PER_CALL = 64
CHARACTERS_PER_CALL = 1_000_000
ENTRIES_AT_ONCE = 1 << 18


class Encoder(NamedTuple):
    encode: Callable[[Sequence[str]], list[list[int]]]
    """Function that returns the token ids of texts without start tokens: the same ids as preparation yields, if the
    tokenizer has the boundary tokens that preparation needs."""
    special: list[str]
    """Special tokens, which a text may spell out."""
    unknown: int | None
    """Id of the tokenizer's unknown token; None if it has none."""


@lru_cache(maxsize=2)
def open_encoder(path: Path, pattern: str | None) -> Encoder:
    """Return the encoder of a tokenizer file.

    It is cached within a process, since loading a large vocabulary takes longer than reading a small file.

    Raises:
        DataError: the file cannot be used, as for `read_given`.
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
    """Survey of one whole file: the last item that reading the file yields."""

    survey: DomainSurvey


def survey_file(
    number: int, file: RawFile, spec: DataSpec, tokenizer: Path | None, rules: bool
) -> Iterator[np.ndarray | Whole]:
    """Yield the entries of a file's documents in arrays, then the survey of the whole file for its domain.

    Args:
        number: the file's number, which its entries carry.
        file: one of `find_files(spec)`.
        spec: the data section with which the file was found.
        tokenizer: the tokenizer file with which tokens are counted; None to count no tokens.
        rules: whether texts are checked against the rules of textrules.py.
    """
    survey, entries = DomainSurvey(), []
    folder = domains.of_folder(subfolder_of(file.domain))
    encoder = open_encoder(tokenizer, spec.tokenizer_pattern) if tokenizer else None
    special = any_of(encoder.special if encoder else [END_OF_TEXT])
    reading = Reading(file, spec)
    for document, ids in _encoded(_documents(reading, survey), encoder):
        text, place = document.text, Place(file.path, document.line)
        words, size = text.split(), len(text.encode())
        own = domains.of_record(document.language)
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
    """Yield each document with its token ids, or with None if there is no encoder."""
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


PARTITION_BYTES = 4 << 30
"""Bytes of raw files per partition of entries; with documents of 500 stored bytes that is 8 million entries, 160 MB."""
MOST_PARTITIONS = 4096
STEPS = 10
"""Largest number of lines that report the progress of reading."""


def survey(request: SurveyRequest, partition_bytes: int = PARTITION_BYTES) -> Survey:
    """Survey all raw files of a request. Ray must be running.

    Args:
        request: the data section, the tokenizer, and whether texts are checked.
        partition_bytes: bytes of raw files per partition of entries.

    Raises:
        DataError: sources are missing, or the tokenizer cannot be used.
    """
    if request.tokenizer:
        open_encoder(request.tokenizer, request.data.tokenizer_pattern)
    ray.data.DataContext.get_current().enable_progress_bars = False
    files = find_files(request.data)
    size = sum(file.size for file in files)
    partitions = min(MOST_PARTITIONS, 1 + size // partition_bytes)
    print(f"{SurveyRequest.kind}: reading {len(files):,} files, {size / 1e6:,.1f} MB", flush=True)
    read = partial(_read_file, request=request, partitions=partitions)
    blocks = ray.data.from_arrow(blocks_of(files)).flat_map(read, compute=_at_once())

    result, held, done = Survey(tokenized=request.tokenizer is not None), [], 0
    for bundle in block_bundles(blocks):
        for ref in bundle.block_refs:
            held.append(ref)
            for row in _only(ray.get(ref), _WHOLE).to_pylist():
                one = pickle.loads(row["data"])
                result.domains.setdefault(row["domain"], DomainSurvey())
                result.domains[row["domain"]] += one
                done += 1
                if done == len(files) or done * STEPS // len(files) > (done - 1) * STEPS // len(files):
                    print(f"{SurveyRequest.kind}: read {done:,} of {len(files):,} files", flush=True)
    documents = sum(domain.whole.documents for domain in result.domains.values())
    print(f"{SurveyRequest.kind}: looking for copies among {documents:,} documents", flush=True)
    for copies in _count(held, partitions, files):
        result.copies += copies
    result.domains = dict(sorted(result.domains.items()))
    return result


def _at_once() -> ray.data.TaskPoolStrategy:
    """Return a task pool with as many tasks as the cluster has CPUs, or as the machine has cores if these are fewer.

    A local cluster may declare more CPUs than the machine has cores, and starting a process for each would take longer
    than reading a few files.
    """
    nodes, cores = [node for node in ray.nodes() if node["Alive"]], os.cpu_count()
    crowded = len(nodes) == 1 and cores is not None and nodes[0]["Resources"].get("CPU", 0) > cores
    return ray.data.TaskPoolStrategy(cores if crowded else None)


MOST_BLOCKS = 1000
"""Largest number of blocks that are passed to one task."""

_WHOLE = -1
"""Value in the column `partition` that marks the row of a whole file."""


def _read_file(row: dict[str, Any], *, request: SurveyRequest, partitions: int) -> Iterator[dict[str, Any]]:
    """Yield rows with `partition`, `domain` and `data`, which holds entries as bytes or a pickled DomainSurvey."""
    file = RawFile(*(row[name] for name in RawFile._fields))
    for item in survey_file(row["number"], file, request.data, request.tokenizer, request.rules):
        if isinstance(item, Whole):
            yield {"partition": _WHOLE, "domain": file.domain, "data": pickle.dumps(item.survey)}
        else:
            for partition, entries in deal(item, partitions):
                yield {"partition": partition, "domain": file.domain, "data": entries.tobytes()}


def _only(block: pa.Table, partition: int) -> pa.Table:
    return block.filter(pc.equal(block["partition"], partition))


def _count(blocks: list[Any], partitions: int, files: list[RawFile]) -> Iterator[Copies]:
    """Return the copies in each partition.

    A single partition is counted by one task without a shuffle, whose start takes longer than the counting, unless it
    has more blocks than can be passed to a task.
    """
    count = partial(_count_partition, domains=[f.domain for f in files], paths=[f.path for f in files])
    if partitions == 1 and len(blocks) <= MOST_BLOCKS:
        alone = ray.remote(_count_alone).options(num_cpus=1)
        counted = ray.get(alone.remote(count, *blocks))["data"].to_pylist()
    else:
        entries = ray.data.from_arrow_refs(blocks).filter(expr=f"partition != {_WHOLE}")
        grouped = entries.groupby("partition", num_partitions=partitions)
        counted = [row["data"] for row in grouped.map_groups(count, batch_format="pyarrow").iter_rows()]
    return map(pickle.loads, counted)


def _count_alone(count: Callable[[pa.Table], pa.Table], *blocks: pa.Table) -> pa.Table:
    return count(pa.concat_tables(_only(block, 0) for block in blocks))


def _count_partition(rows: pa.Table, *, domains: list[str], paths: list[str]) -> pa.Table:
    """Turn all rows of one partition into a table of one row, a pickled Copies."""
    entries = np.frombuffer(b"".join(rows["data"].to_pylist()), ENTRY)
    return pa.table({"data": [pickle.dumps(count_copies(entries, domains, paths))]})
