"""The pipeline from raw text to packed shards, with Ray Data.

    files -> chunks of documents -> parts (their tokens)      chunks.py, tokenise.py
    parts, domain by domain      -> shards (packed samples)   packing.py, validation.py

Files are read, chunks tokenised and shards packed in parallel; each task holds a few chunks or one shard in memory. The
result depends on the files and the settings only, never on how many tasks ran at once or whether a job was killed in
between. It is published under its name in one rename, when it is complete.
"""

import pickle
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray
import ray.data
from tokenizers import Tokenizer

from mhmoe_ray.data.prepare.baselines import baselines, joined, pairs
from mhmoe_ray.data.prepare.chunks import CHUNK, FILE, Limit, quarantine_file, read_chunks
from mhmoe_ray.data.prepare.packing import Made, make_shard, plan_shards
from mhmoe_ray.data.prepare.parts import PartRef, Stream
from mhmoe_ray.data.prepare.tokenise import Part, Tokenised, tokenise_chunk
from mhmoe_ray.data.prepare.validation import Chosen, choose
from mhmoe_ray.data.prepare.work import Report, Workplace, at_work, clear, publish
from mhmoe_ray.data.shards.files import ShardReader, padding_token, token_bytes_for
from mhmoe_ray.data.shards.manifest import (
    Baselines,
    DataManifest,
    Domain,
    Shard,
    prepared_for,
    read_data_manifest,
    recipe,
    require_data_manifest,
)
from mhmoe_ray.data.sources import Tally, blocks_of, find_files
from mhmoe_ray.data.sources.find import fingerprints
from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer, store_given, train_tokenizer
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import describe_file, write_json

CPUS_PER_READER = 8
"""CPUs per reader: one core reads at least as fast as this many tokenise. Readers and tokenising tasks wait for each
other, so readers take no CPU of Ray's."""

MOST_CPUS_TO_COME = 64
"""Largest number of CPUs that a cluster without any yet is expected to get; readers for them start at once and may run
on its head."""

BASELINE_TOKENS = 20_000_000


def prepare(spec: RunSpec) -> DataManifest:
    """Return the manifest of a spec's prepared folder, which is made if it is missing. Ray must be running.

    Raises:
        DataError: sources are missing, more is bad than allowed, or the folder was made with other settings.
    """
    folder = spec.data.prepared
    if read_data_manifest(folder) is None:
        try:
            with at_work(spec) as place, _chunks_as_blocks():
                _Preparation(spec, place).run()
                publish(place.result, folder)
        except Exception:
            if read_data_manifest(folder) is None:
                raise
            # Another job was first and has taken the parts away.
        require_data_manifest(folder)  # else something that is no job's lies there, and the parts are kept
    clear(folder)  # also what a job left that was killed before it came here
    return prepared_for(spec)


@contextmanager
def _chunks_as_blocks() -> Iterator[None]:
    """Set the block size of Ray Data to a chunk within this context, since one task tokenises a block.

    Progress bars are switched off, too, since they would fill the job's log.
    """
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    context.target_max_block_size, context.enable_progress_bars = CHUNK, False
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars = before


class _Preparation:
    def __init__(self, spec: RunSpec, place: Workplace) -> None:
        self._spec, self._data, self._place = spec, spec.data, place
        self._tokenizer = place.result / "tokenizer.json"
        self._token_bytes = token_bytes_for(spec.model.vocab_size)
        self._files, self._fingerprints = find_files(spec.data), fingerprints(spec.data)
        self._limit = Limit(spec.data, self._files)
        self._report = Report(place.shared, sum(file.size for file in self._files))

    def run(self) -> None:
        """Run all stages; afterwards the staging directory has the whole result."""
        self._say(f"tokenizer for {len(self._files)} files")
        self._report.enter("tokenizer")
        start = self._make_tokenizer()
        self._say(f"tokenising {len(self._files)} files")
        self._report.enter("tokenising")
        parts, tallies = self._tokenise()
        by_domain: dict[str, list[Part]] = defaultdict(list)
        for part in parts:
            by_domain[self._files[part.file].domain].append(part)
        self._check_not_empty(by_domain)
        self._say(f"packing {len(by_domain)} domains and languages")
        made = self._pack(by_domain, start)
        self._report.enter("finishing")
        held_out = {name: self._held_out(own) for name, own in sorted(by_domain.items())}
        shards = {name: [m.shard for m in made[name]] for name in by_domain}
        finish = ray.remote(_finish).options(num_cpus=1)
        chosen, figures = ray.get(finish.remote(self._place.result, held_out, shards, self._spec, self._token_bytes))
        manifest = DataManifest(
            recipe=recipe(self._spec),
            fingerprints=self._fingerprints,
            seq_len=self._data.seq_len,
            token_bytes=self._token_bytes,
            tokenizer_sha256=describe_file(self._tokenizer).sha256,
            domains={
                name: _domain(by_domain[name], tallies[name], made[name], chosen.samples[name], self._data.seq_len)
                for name in sorted(by_domain)
            },
            validation=chosen.shards,
            validation_tokens=chosen.targets,
            baselines=figures,
            bad_lines=sum(tally.bad.total() for tally in tallies.values()),
        )
        write_json(self._place.result / "manifest.json", manifest.model_dump(mode="json"))

    def _say(self, text: str) -> None:
        print(f"prepare: {text}", flush=True)

    def _make_tokenizer(self) -> int:
        """Write tokenizer.json and return the token that each document begins with."""
        path, vocab_size = self._tokenizer, self._spec.model.vocab_size
        if self._data.tokenizer is not None:
            store_given(self._data, vocab_size, path)
        else:
            train = ray.remote(train_tokenizer).options(num_cpus=1)
            tokenizer: Tokenizer = ray.get(train.remote(self._files, self._data, vocab_size))
            tokenizer.save(str(path))
        return boundaries(load_tokenizer(path, vocab_size)).start

    def _tokenise(self) -> tuple[list[Part], dict[str, Tally]]:
        """Tokenise all files and write the quarantine file.

        Returns:
            All parts in the order of files and chunks, and the tallies by domain.

        Raises:
            DataError: more is bad than the spec allows.
        """
        quarantine = self._place.quarantine
        read = partial(read_chunks, spec=self._data, limit=self._limit, quarantine=quarantine, characters=CHUNK)
        tokenise = partial(
            tokenise_chunk,
            tokenizer=self._tokenizer,
            tokenizer_sha256=describe_file(self._tokenizer).sha256,
            parts=self._place.parts,
            validation_fraction=self._data.validation_fraction,
            token_bytes=self._token_bytes,
        )
        # A cluster whose nodes start when they are needed may have none yet.
        cpus = ray.cluster_resources().get("CPU", 0) or min(self._spec.cluster.cpus, MOST_CPUS_TO_COME)
        readers = ceil(cpus / CPUS_PER_READER)
        files = ray.data.from_arrow(blocks_of(self._files))
        chunks = files.map_batches(read, batch_format="pyarrow", batch_size=1, num_cpus=0, concurrency=readers)
        parts, tally, report = [], Tally(), self._report
        tallies, quarantined = defaultdict[str, Tally](Tally), []
        for row in chunks.map_batches(tokenise, batch_format="pyarrow", batch_size=1).iter_rows():
            chunk = Tokenised.of_row(row)
            part = chunk.part
            parts.append(part)
            tally += chunk.tally
            tallies[self._files[part.file].domain] += chunk.tally
            if chunk.tally.bad:
                quarantined.append((part.file, part.chunk))
            if chunk.stopped or self._limit.hopeless(tally):
                raise self._limit.error(tally)
            tokens = part.counts.tokens + part.counts.held_out_tokens
            report.done_bytes = tally.bytes_read
            report.documents, report.tokens = tally.documents, report.tokens + tokens
            if chunk.found:
                report.found_bytes += chunk.tally.bytes_read
                report.found_tokens += tokens
            report.refresh()
        if self._limit.exceeded(tally):
            raise self._limit.error(tally)
        before = f", {report.found_tokens:,} of them from before" if report.found_tokens else ""
        self._say(f"{report.documents:,} documents have {report.tokens:,} tokens{before}")
        parts.sort(key=lambda part: (part.file, part.chunk))
        with (self._place.result / FILE).open("wb") as out:
            for file, number in sorted(quarantined):
                out.write(quarantine_file(quarantine, file, number).read_bytes())
        return parts, tallies

    def _check_not_empty(self, by_domain: dict[str, list[Part]]) -> None:
        """Check that there are held-out documents with tokens, and tokens for a training sample.

        The check is not in a task, since Ray would wrap its error in a traceback.

        Raises:
            DataError: there is nothing to validate with, or nothing to train on.
        """
        if not any(part.counts.held_out_documents for own in by_domain.values() for part in own):
            fix = "raise data.validation_fraction or add documents"
            raise DataError("validation", "no document fell into the held-out share", fix)
        if all(sum(part.counts.held_out_tokens for part in own) < 2 for own in by_domain.values()):
            raise DataError("validation", "the documents of the held-out share have no tokens", fix)
        needed = 1 if self._data.packing == "best_fit" else self._data.seq_len + 1
        if all(sum(part.counts.tokens for part in own) < needed for own in by_domain.values()):
            raise DataError("training", "no domain fills a single sample", "shorten data.seq_len or add documents")

    def _training(self, parts: list[Part]) -> Stream:
        refs = [PartRef(part.name, 0, part.counts.tokens) for part in parts if part.counts.tokens]
        return Stream(self._place.parts, refs, self._token_bytes)

    def _held_out(self, parts: list[Part]) -> Stream:
        counted = [(part.name, part.counts) for part in parts if part.counts.held_out_tokens]
        refs = [PartRef(name, n.tokens, n.tokens + n.held_out_tokens) for name, n in counted]
        return Stream(self._place.parts, refs, self._token_bytes)

    def _pack(self, by_domain: dict[str, list[Part]], start: int) -> dict[str, list[Made]]:
        """Write the shards of all domains; return those of each domain in order."""
        plans = [
            p
            for name, parts in by_domain.items()
            for p in plan_shards(name, self._training(parts), self._data, self._token_bytes)
        ]
        self._report.shards, self._report.total_shards = 0, len(plans)
        self._report.enter("packing")
        task = partial(
            make_shard,
            folder=self._place.result,
            seq_len=self._data.seq_len,
            token_bytes=self._token_bytes,
            start=start,
        )
        made: dict[str, list[Made]] = {name: [] for name in by_domain}
        rows = [{"plan": pickle.dumps(p)} for p in plans]
        for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(task).iter_rows():
            shard: Made = pickle.loads(row["made"])
            made[shard.domain].append(shard)
            self._report.shards += 1
            self._report.refresh()
        return {name: sorted(shards, key=lambda m: m.number) for name, shards in made.items()}


def _domain(parts: list[Part], tally: Tally, made: list[Made], validation_samples: int, seq_len: int) -> Domain:
    counts = [part.counts for part in parts]
    documents, tokens = sum(c.documents for c in counts), sum(c.tokens for c in counts)
    samples, padding = sum(m.shard.rows for m in made), sum(m.padding for m in made)
    # Best fit makes each token and each document's end a target; concatenation each token but the first.
    targets = samples * seq_len - padding
    return Domain(
        documents=documents,
        validation_documents=sum(c.held_out_documents for c in counts),
        quarantined=dict(tally.bad),
        dropped=dict(tally.dropped),
        text_bytes=sum(c.text_bytes for c in counts),
        tokens=tokens,
        validation_tokens=sum(c.held_out_tokens for c in counts),
        samples=samples,
        validation_samples=validation_samples,
        unused_tokens=max(0, tokens - 1 - targets),
        padding=padding,
        cut_documents=documents - sum(m.whole_documents for m in made),
        shards=[m.shard for m in made],
    )


class _Finished(NamedTuple):
    chosen: Chosen
    figures: Baselines


def _finish(
    work: Path, held_out: dict[str, Stream], shards: dict[str, list[Shard]], spec: RunSpec, token_bytes: int
) -> _Finished:
    """Write the validation samples and compute the baselines."""
    chosen = choose(work, held_out, spec.data.validation_samples, spec.data.seq_len, token_bytes)
    padding = padding_token(token_bytes)
    readers = [ShardReader(work, shards[name], token_bytes) for name in sorted(shards) if shards[name]]
    part = min(1.0, BASELINE_TOKENS / (sum(len(reader) for reader in readers) * spec.data.seq_len))
    counted = (pairs(reader.read(np.arange(ceil(part * len(reader)))), padding) for reader in readers)
    validation = ShardReader(work, chosen.shards, token_bytes)
    figures = baselines(
        joined(counted),
        pairs(validation.read(np.arange(len(validation))), padding),
        spec.model.vocab_size,
    )
    return _Finished(chosen, figures)
