"""Reader of RedPajama-V2: documents with quality signals and tables of duplicates, and the rules that filter them.

    documents/<snapshot>/<shard>/<language>_<bucket>.json.gz               one object a line, the text is `raw_content`
    quality_signals/<snapshot>/<shard>/<language>_<bucket>.signals.json.gz     in the same order; `id` ends in /<row>
    duplicates/<snapshot>/<shard>/<language>_<bucket>.duplicates.parquet       `doc_id` ends in /<row>
    minhash/<snapshot>/<shard>/<language>_<bucket>.minhash.parquet             `id` ends in /<row>

A row is the number of a line in the file of documents, from 0. Tables are joined by it, so a line that is missing in
one of them loses one document and leaves the following lines aligned.

`gopher: true` means the rules of Rae et al. 2021 (arXiv 2112.11446, appendix A.1.1) for which V2 has a signal: none on
duplicate lines and paragraphs, and with the stop words that V2 counts for each language.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from mhmoe_ray.data.sources.columns import PYARROW_ERRORS, open_parquet, rows_per_batch
from mhmoe_ray.data.sources.items import BadLine, Document, Fault, RawFile, ReadSettings, Reason, Tally
from mhmoe_ray.data.sources.records import Record, document_of, read_records
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.spec import FilterSpec, SignalRule, SourceSpec
from mhmoe_ray.storage import short_message

Signals = Mapping[str, list[list[Any]]]
"""Quality signals by name, as spans [start, end, score or null]: one for the document, or in `rps_lines_...` one for
each line."""

GOPHER_RULES = (
    "rps_doc_word_count >= 50",
    "rps_doc_word_count <= 100000",
    "rps_doc_mean_word_length >= 3",
    "rps_doc_mean_word_length <= 10",
    "rps_doc_symbol_to_word_ratio <= 0.1",
    "rps_lines_start_with_bulletpoint <= 0.9",
    "rps_doc_frac_lines_end_with_ellipsis <= 0.3",
    "rps_doc_frac_no_alph_words <= 0.2",
    "rps_doc_frac_chars_top_2gram <= 0.2",
    "rps_doc_frac_chars_top_3gram <= 0.18",
    "rps_doc_frac_chars_top_4gram <= 0.16",
    "rps_doc_frac_chars_dupe_5grams <= 0.15",
    "rps_doc_frac_chars_dupe_6grams <= 0.14",
    "rps_doc_frac_chars_dupe_7grams <= 0.13",
    "rps_doc_frac_chars_dupe_8grams <= 0.12",
    "rps_doc_frac_chars_dupe_9grams <= 0.11",
    "rps_doc_frac_chars_dupe_10grams <= 0.1",
)
MIN_STOP_WORDS = 2
"""Smallest number of stop words that satisfies Gopher's rules; V2 stores their share of all words."""


class Rule(NamedTuple):
    """Rule on quality signals; the documents that break it are dropped and counted under its name."""

    name: str
    is_satisfied: Callable[[Signals], bool]
    """Check of a document's signals; it raises KeyError for a missing signal, TypeError or ValueError for a wrong
    form."""


def filter_rules(filters: FilterSpec) -> list[Rule]:
    """Return a source's rules on quality signals, in the order in which they are checked."""
    rules = []
    if filters.gopher:
        rules = [_parse_rule(text, "gopher: ") for text in GOPHER_RULES]
        rules.append(Rule(f"gopher: {MIN_STOP_WORDS} stop words", _has_stop_words))
    return rules + [_parse_rule(text) for text in filters.signals]


def _parse_rule(text: str, prefix: str = "") -> Rule:
    parsed = SignalRule.parse(text)
    return Rule(f"{prefix}{parsed}", lambda signals: parsed.holds(signal_value(signals, parsed.signal)))


def _has_stop_words(signals: Signals) -> bool:
    share, words = signal_value(signals, "rps_doc_stop_word_fraction"), signal_value(signals, "rps_doc_word_count")
    # The share is rounded to eight digits, so the product is only close to the number of stop words. The limit is
    # therefore half a word lower.
    return share is not None and words is not None and share * words > MIN_STOP_WORDS - 0.5


def signal_value(signals: Signals, name: str) -> float | None:
    """Return a signal's score or the mean of its lines' scores; None without a score, KeyError without the signal."""
    scores = [score for _, _, score in signals[name] if score is not None]
    return sum(scores) / len(scores) if scores else None


TEXT_FIELD = "raw_content"
DOCUMENTS_PATH = re.compile(r"documents/(\d{4}-\d{2}/\d{4}/([a-z]{2,3})_(head|middle|tail))\.json\.gz\Z")
"""Path of a file of documents; the groups are the part shared with the sidecar files, the language and the bucket."""

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near duplicate in its file"


class SidecarFiles(NamedTuple):
    """Paths of the files beside a file of documents: quality signals, duplicates and MinHash signatures."""

    signals: str
    duplicates: str
    minhash: str

    @classmethod
    def from_documents(cls, documents: str) -> "SidecarFiles":
        """Return the paths for a file of documents."""
        match = DOCUMENTS_PATH.search(documents)
        assert match is not None, "find.py takes no other file for RedPajama-V2's"
        root, stem = documents[: match.start()], match[1]
        return cls(
            f"{root}quality_signals/{stem}.signals.json.gz",
            f"{root}duplicates/{stem}.duplicates.parquet",
            f"{root}minhash/{stem}.minhash.parquet",
        )

    def required_paths(self, filters: FilterSpec) -> list[str]:
        """Return the paths of the files that the filters of a source need."""
        is_required = {
            self.signals: filters.gopher or filters.signals,
            self.duplicates: filters.deduplicate,
            self.minhash: filters.near_duplicates,
        }
        return [path for path, required in is_required.items() if required]


def read_redpajama_v2(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield a RedPajama-V2 file's documents that pass the source's filters; count the others in `tally.dropped`."""
    text_field, filters = source.text_field or TEXT_FIELD, source.filters or FilterSpec()
    sidecars = SidecarFiles.from_documents(file.path)
    rules = filter_rules(filters)
    signals = _SignalReader(storage, sidecars.signals, settings.document_bytes) if rules else None
    line = 1
    try:
        # The table of duplicates lists all copies but the first, so that all in it can be dropped.
        table = _read_table(storage, sidecars.duplicates, "doc_id", "doc_id") if filters.deduplicate else ()
        duplicates = {row for row, _ in table}
        near_duplicates = (
            _NearDuplicates(storage, sidecars.minhash, filters.near_duplicates) if filters.near_duplicates else None
        )
        for record in read_records(storage, file, settings.document_bytes, tally):
            document = record if isinstance(record, BadLine) else document_of(record, text_field, file.path)
            line, row = document.line, document.line - 1
            if isinstance(document, BadLine):
                yield document
                continue
            if row in duplicates:
                tally.dropped[DUPLICATE] += 1
                continue
            if signals is not None:
                broken_rule = signals.broken_rule(row, rules)
                if isinstance(broken_rule, Fault):
                    yield BadLine(file.path, line, *broken_rule)
                    continue
                if broken_rule is not None:
                    tally.dropped[broken_rule.name] += 1
                    continue
            # This check comes last, because it remembers each row that it lets pass. A row that another filter drops
            # must not make later rows near duplicates.
            if near_duplicates is not None and near_duplicates.is_duplicate(row):
                tally.dropped[NEAR_DUPLICATE] += 1
                continue
            yield document
    except _TableError as e:
        yield BadLine(file.path, line, Reason.PART_LOST, str(e))


class _TableError(Exception):
    """Damage of a table of duplicates or signatures, without which no more documents can be filtered."""


class _SignalReader:
    """Reader of a file of quality signals, which checks documents against rules in the order of their rows."""

    def __init__(self, storage: Storage, path: str, limit: int) -> None:
        self._path = path
        # The counts of this file of quality signals are discarded, because a bad line in it is counted as the document
        # that is lost with it.
        self._records = read_records(storage, RawFile("", path, 0, "jsonl"), limit, Tally())
        self._row = -1
        self._signals: Any = None
        self._missing_reason = "no record"

    def broken_rule(self, row: int, rules: list[Rule]) -> Rule | Fault | None:
        """Return the first rule that a document breaks, if any. `row` counts from 0 and must grow from call to call."""
        while self._row < row and self._read_next():
            pass
        if self._row != row:
            return Fault(Reason.NO_SIGNALS, f"{self._missing_reason} in {self._path}")
        self._missing_reason = "no record"
        # Signals may have any form, so a rule may raise any of these exceptions.
        try:
            return next((rule for rule in rules if not rule.is_satisfied(self._signals)), None)
        except KeyError as e:
            return Fault(Reason.NO_SIGNALS, f"no {e.args[0]} in {self._path}")
        except (TypeError, ValueError):
            return Fault(Reason.NO_SIGNALS, f"quality_signals of another form in {self._path}")

    def _read_next(self) -> bool:
        """Read the next record and keep its signals if its row comes later; return False at the file's end."""
        record = next(self._records, None)
        if isinstance(record, Record):
            fields = record.fields if isinstance(record.fields, dict) else {}
            row = row_of(fields.get("id"))
            if row is not None and row > self._row:
                self._row, self._signals = row, fields.get("quality_signals")
        elif isinstance(record, BadLine):
            self._missing_reason = f"line {record.line}: {record.message}"
        return record is not None


def row_of(identifier: object) -> int | None:
    """Return the row number at the end of an identifier, 17 for `2023-06/0000/en_head.json.gz/17`, or None."""
    row = identifier.rpartition("/")[2] if isinstance(identifier, str) else ""
    return int(row) if row.isascii() and row.isdigit() else None


class _NearDuplicates:
    """Detector of documents that share a band of the MinHash signature with an earlier document that was kept."""

    def __init__(self, storage: Storage, path: str, similarity: float) -> None:
        self._rows = _read_table(storage, path, "id", f"signature_sim{similarity}")
        self._row = -1
        self._bands: list[bytes] = []
        self._kept_bands: set[int] = set()

    def is_duplicate(self, row: int) -> bool:
        """Return whether a document is a near duplicate of an earlier one; if not, keep it for later comparisons.

        `row` counts from 0 and must grow from call to call. A text that is too short for a signature is not a near
        duplicate.
        """
        while self._row < row:
            self._row, bands = next(self._rows, (1 << 62, None))
            self._bands = bands or []
        if self._row != row:
            return False
        # A 64-bit hash of each band suffices: a file has far fewer than 2**32 bands, so collisions are unlikely.
        bands = {hash((i, band)) for i, band in enumerate(self._bands)}
        if not self._kept_bands.isdisjoint(bands):
            return True
        self._kept_bands |= bands
        return False


def _read_table(storage: Storage, path: str, id_column: str, column: str) -> Iterator[tuple[int, Any]]:
    """Yield the row number and the value in `column` of each entry; damage to the table is a `_TableError`."""
    try:
        with open_parquet(storage, path) as table, storage.open_seekable(path) as stream:
            columns = list(dict.fromkeys([id_column, column]))
            # Each row group is read separately. A batch over two groups would be lost as a whole if the second group is
            # damaged.
            groups = range(table.num_row_groups)
            group_rows = (rows_per_batch(table, stream, g, columns, 4096) for g in groups)
            batches = (table.iter_batches(rows, [g], columns, use_threads=False) for g, rows in enumerate(group_rows))
            for batch in chain.from_iterable(batches):
                for name in columns:
                    batch.column(name).validate(full=True)
                for identifier, value in zip(batch.column(id_column), batch.column(column), strict=True):
                    row = row_of(identifier.as_py())
                    if row is None:
                        raise _TableError(f"{path}: {id_column} does not end in a row")
                    yield row, value.as_py()
    except PYARROW_ERRORS as e:
        raise _TableError(f"{path}: {short_message(e)}") from e
