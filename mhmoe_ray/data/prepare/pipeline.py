"""The pipeline from raw text to packed shards, with Ray Data.

    files -> chunks of documents -> parts (their tokens)      chunks.py, tokenise.py
    parts, domain by domain      -> shards (packed samples)   packing.py, validation.py; rows.py for an encoder

Each task has a few chunks or one shard in memory. The result depends on the files and the settings only, not on the
number of tasks or on killed jobs. One rename publishes it.
"""

import hashlib
import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any

import ray
import ray.data
from tokenizers import Tokenizer

from mhmoe_ray.data.chat.encoder import ConversationEncoder
from mhmoe_ray.data.chat.process import ChatTemplateError
from mhmoe_ray.data.chat.template import ChatTemplate, check_template, template_error
from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.family import data_of
from mhmoe_ray.data.images.annotations import require_image_packages
from mhmoe_ray.data.prepare.checks import sparse_parts
from mhmoe_ray.data.prepare.chunks import (
    CHUNK_CHARACTERS,
    QuarantineLimit,
    quarantine_file,
    read_chunks,
)
from mhmoe_ray.data.prepare.finish import FinishResult, domain_entry, finish
from mhmoe_ray.data.prepare.packing import PackingSettings, ShardPlan, ShardResult, plan_shards
from mhmoe_ray.data.prepare.parts import PartSlice, TokenisedPart, TokenStream
from mhmoe_ray.data.prepare.rows import RowPlan, plan_row_shards
from mhmoe_ray.data.prepare.tokenise import TokenisedChunk, tokenise_chunk
from mhmoe_ray.data.prepare.validation import split_of_few_documents
from mhmoe_ray.data.prepare.work import (
    ProgressReport,
    Stage,
    StagingDirectory,
    clean_up,
    publish,
    staging_directory,
)
from mhmoe_ray.data.shards.columns import conversation_dtype, token_bytes_for, token_dtype
from mhmoe_ray.data.shards.manifest import (
    MANIFEST_FILE,
    QUARANTINE_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    ChatData,
    DataManifest,
    Shard,
    read_data_manifest,
    require_data_manifest,
)
from mhmoe_ray.data.shards.recipe import recipe, require_prepared_data
from mhmoe_ray.data.sources import Tally, file_blocks, find_files
from mhmoe_ray.data.sources.find import fingerprints
from mhmoe_ray.data.tokenizer import boundaries, chat_texts, load_tokenizer, store_given_tokenizer, train_tokenizer
from mhmoe_ray.errors import DataError, MhmoeError, StorageError, task_error
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location, create_file, describe_file, explain_error, replace_file, write_json

CPUS_PER_READER = 8
"""CPUs for each reader of files: one core reads at least as fast as this many tokenise. Readers and tokenising tasks
wait for each other, so readers reserve no CPU in Ray."""

CPUS_PER_IMAGE_READER = 1
"""CPUs for each reader of images, which spends nearly all of its time decoding."""

CPUS_PER_CHAT_READER = 2
"""CPUs for each reader of conversations, which renders them about as long as they are tokenised."""

MAX_EXPECTED_CPUS = 64
"""Largest number of CPUs assumed for an autoscaling cluster without nodes, whose readers may all start on the head
node."""


def prepare(spec: RunSpec) -> DataManifest:
    """Prepare the data of a spec, unless its prepared folder exists, and return the manifest; Ray must be running.

    Missing sources, too many bad lines, and a folder with other settings are a DataError; a disk that is full,
    read-only or out of reach is a StorageError.
    """
    folder = spec.data.prepared
    with _errors_of_tasks(folder):
        if read_data_manifest(folder) is None:
            try:
                with staging_directory(spec) as staging, ray.data.DataContext.current(_ray_data_context()):
                    _Preparation(spec, staging).run()
                    publish(staging, folder)
            except Exception:
                if read_data_manifest(folder) is None:
                    raise
                # Another job published its result first and removed our parts (the encoded chunks), which made this
                # job fail. The error is ignored, because the result of the other job is used.
            # If a folder without a manifest appeared meanwhile, nothing was published. This check then fails before
            # `clean_up`, so that the parts are kept.
            require_data_manifest(folder)
        # This also removes the staging directory of a job that was killed after publishing its result and before
        # cleaning up.
        clean_up(folder)
        return require_prepared_data(spec)


@contextmanager
def _errors_of_tasks(folder: Location) -> Iterator[None]:
    """Raise a task's MhmoeError in place of Ray's error, and a StorageError for an OSError."""
    try:
        yield
    except (ray.exceptions.RayTaskError, OSError) as e:
        error = task_error(e)
        if isinstance(error, MhmoeError):
            raise error from e
        if isinstance(error, OSError):
            fix = "make room or repair the storage, then give the command again"
            raise StorageError(f"data {folder}", *explain_error(error, fix)) from e
        raise


def _write_shard(row: dict[str, Any], *, settings: PackingSettings) -> dict[str, Any]:
    """Write the shard of a pickled plan (`plan`); return a pickled `ShardResult` (`result`)."""
    plan: ShardPlan | RowPlan = pickle.loads(row["plan"])
    return {"result": pickle.dumps(plan.write(settings))}


def _ray_data_context() -> ray.data.DataContext:
    context = ray.data.DataContext.get_current().copy()
    # A task tokenises one block, so a block is made as small as one chunk.
    context.target_max_block_size = CHUNK_CHARACTERS
    # Progress bars would fill the job's log.
    context.enable_progress_bars = False
    # By default Ray Data wraps a task's error in a UserCodeException, which does not keep the error as its cause.
    context.raise_original_map_exception = True
    return context


class _Preparation:
    """Preparation of a spec's data by one job, in a staging directory."""

    def __init__(self, spec: RunSpec, staging: StagingDirectory) -> None:
        self._spec, self._data_spec, self._staging = spec, spec.data, staging
        self._tokenizer = staging.result_path / TOKENIZER_FILE if spec.model.family.has_tokenizer else None
        self._family_data = data_of(spec.model)
        self._has_rows = self._family_data.has_rows
        self._token_bytes = token_bytes_for(spec.model.vocab_size)
        if spec.data.chat_sources:
            # Tasks render conversations, too, but Ray would wrap their errors in tracebacks. So the template is checked
            # here.
            check_template(spec.data)
        require_image_packages(spec.data.sources.values())
        self._files = find_files(spec.data)
        self._fingerprints = fingerprints(spec.data, self._files)
        self._limit = QuarantineLimit(spec.data, self._files)
        self._report = ProgressReport(staging.shared_path, sum(file.size for file in self._files))

    def run(self) -> None:
        """Run all stages and write the complete result, the manifest last."""
        start, template, chat, tokenizer_sha256 = 0, None, None, None
        if self._tokenizer is not None:
            self._log(f"tokenizer for {len(self._files)} files")
            self._report.enter_stage("tokenizer")
            tokenizer = self._make_tokenizer(self._tokenizer)
            start = boundaries(tokenizer).start
            template, chat = self._check_chat(tokenizer)
            tokenizer_sha256 = describe_file(self._tokenizer).sha256
        # The recipe has hashes of the given tokenizer and of the chat template. They are computed now, because users
        # may change these files while the data is prepared.
        used_recipe = recipe(self._spec)
        stage: Stage = "tokenising" if self._tokenizer else "reading"
        self._log(f"{stage} {len(self._files)} files")
        self._report.enter_stage(stage)
        fraction = self._data_spec.validation_fraction
        parts, tallies = self._tokenise(template, tokenizer_sha256, fraction)
        can_cut = not (self._has_rows or self._data_spec.chat_sources)
        split = split_of_few_documents([part.counts for part in parts], fraction, can_cut=can_cut)
        if split != (fraction, False):
            held_out_text = "the end of the only document" if split[1] else "one document"
            self._log(f"a share of {fraction:g} holds out no document of so few: {held_out_text} is held out")
            parts, tallies = self._tokenise(template, tokenizer_sha256, *split)
        by_domain: dict[str, list[TokenisedPart]] = defaultdict(list)
        for part in parts:
            by_domain[self._files[part.file].domain].append(part)
        facts = self._family_data.check_parts(self._spec, self._staging.result_path, by_domain)
        self._log(f"packing {len(by_domain)} domains and languages")
        settings = PackingSettings(
            self._staging.result_path,
            self._staging.parts_path,
            self._data_spec.seq_len,
            self._token_bytes,
            start,
            bool(self._data_spec.pair_sources),
        )
        shard_results = self._write_shards(settings, by_domain)
        self._report.enter_stage("finishing")
        shards = {name: [result.shard for result in shard_results[name]] for name in by_domain}
        validation, baselines = self._write_validation(settings, by_domain, shards)
        facts |= self._family_data.finish(self._spec, self._staging.result_path, by_domain, shards, self._log)
        manifest = DataManifest(
            recipe=used_recipe,
            fingerprints=self._fingerprints,
            seq_len=self._data_spec.seq_len,
            token_bytes=self._token_bytes,
            tokenizer_sha256=tokenizer_sha256,
            chat=chat,
            **facts,
            domains={
                name: domain_entry(
                    by_domain[name],
                    tallies[name],
                    shard_results[name],
                    validation.sample_counts[name],
                    self._data_spec.seq_len,
                    has_chat=chat is not None,
                    has_rows=self._has_rows,
                )
                for name in sorted(by_domain)
            },
            validation=validation.shards,
            validation_tokens=validation.target_count,
            baselines=baselines,
            bad_lines=sum(tally.bad.total() for tally in tallies.values()),
        )
        if self._has_rows:
            for warning in sparse_parts(self._spec, manifest.domains):
                self._log(f"warning: {warning}")
        write_json(self._staging.result_path / MANIFEST_FILE, manifest.model_dump(mode="json"))

    def _log(self, text: str) -> None:
        print(f"prepare: {text}", flush=True)

    def _make_tokenizer(self, path: Location) -> Tokenizer:
        vocab_size = self._spec.model.text_vocab_size
        if self._data_spec.tokenizer is not None:
            store_given_tokenizer(self._data_spec, vocab_size, path)
        else:
            train = ray.remote(train_tokenizer).options(num_cpus=1)
            tokenizer: Tokenizer = ray.get(train.remote(self._files, self._data_spec, vocab_size))
            replace_file(path, tokenizer.to_str(pretty=True).encode())
        return load_tokenizer(path, vocab_size)

    def _check_chat(self, tokenizer: Tokenizer) -> tuple[ChatTemplate, ChatData] | tuple[None, None]:
        """Write the chat template, and return it with its manifest entry."""
        if not self._data_spec.chat_sources:
            return None, None
        template = check_template(self._data_spec, *chat_texts(tokenizer))
        try:
            turn_ends = ConversationEncoder(tokenizer).turn_ends(template)
        except ChatTemplateError as e:
            raise template_error(self._data_spec, str(e)) from e
        content = template.text.encode()
        replace_file(self._staging.result_path / TEMPLATE_FILE, content)
        digest = hashlib.sha256(content).hexdigest()
        return template, ChatData(
            template_sha256=digest, start_token=boundaries(tokenizer).start, turn_ends=sorted(turn_ends)
        )

    def _tokenise(
        self, template: ChatTemplate | None, tokenizer_sha256: str | None, fraction: float, is_cut: bool = False
    ) -> tuple[list[TokenisedPart], dict[str, Tally]]:
        """Tokenise all files and write the quarantine; return the parts by file and chunk, and each domain's tally."""
        quarantine = self._staging.quarantine_path
        read = partial(
            read_chunks,
            spec=self._data_spec,
            limit=self._limit,
            quarantine=quarantine,
            characters=CHUNK_CHARACTERS,
            template=template,
        )
        tokenise = partial(
            tokenise_chunk,
            tokenizer=self._tokenizer,
            tokenizer_sha256=tokenizer_sha256,
            parts=self._staging.parts_path,
            validation_fraction=fraction,
            is_cut=is_cut,
            token_bytes=self._token_bytes,
            row_tokens=self._data_spec.seq_len if self._has_rows else None,
        )
        # An autoscaling cluster may have no nodes yet. The number of readers then follows from the CPUs that the spec
        # asks for.
        cpus = ray.cluster_resources().get("CPU", 0) or min(self._spec.cluster.cpus, MAX_EXPECTED_CPUS)
        cpus_per_reader = CPUS_PER_CHAT_READER if template else CPUS_PER_READER
        readers = ceil(cpus / (CPUS_PER_IMAGE_READER if self._data_spec.has_images else cpus_per_reader))
        files = ray.data.from_arrow(file_blocks(self._files))
        chunks = files.map_batches(read, batch_format="pyarrow", batch_size=1, num_cpus=0, concurrency=readers)
        parts, tally, report = [], Tally(), self._report
        report.tokens = report.reused_tokens = 0
        tallies, quarantined = defaultdict[str, Tally](Tally), []
        for row in chunks.map_batches(tokenise, batch_format="pyarrow", batch_size=1).iter_rows():
            chunk = TokenisedChunk.from_row(row)
            part = chunk.part
            parts.append(part)
            tally += chunk.tally
            tallies[self._files[part.file].domain] += chunk.tally
            if chunk.tally.bad:
                quarantined.append((part.file, part.chunk))
            if chunk.is_aborted or self._limit.will_be_exceeded(tally):
                raise self._limit.error(tally)
            tokens = part.counts.tokens + part.counts.held_out_tokens
            report.done_bytes = tally.bytes_read
            report.documents, report.tokens = tally.documents, report.tokens + tokens
            if chunk.is_reused:
                report.reused_tokens += tokens
            report.refresh()
        if self._limit.is_exceeded(tally):
            raise self._limit.error(tally)
        reused_text = f", {report.reused_tokens:,} of them from an earlier job" if report.reused_tokens else ""
        tokens_text = f" have {report.tokens:,} tokens{reused_text}" if self._tokenizer else ""
        self._log(f"{report.documents:,} documents{tokens_text}")
        # Tasks end in any order. Sorting the parts makes the result independent of that order.
        parts.sort(key=lambda part: (part.file, part.chunk))
        # An earlier call may have written this file.
        (self._staging.result_path / QUARANTINE_FILE).unlink(missing_ok=True)
        with create_file(self._staging.result_path / QUARANTINE_FILE) as out:
            for file, number in sorted(quarantined):
                out.write(quarantine_file(quarantine, file, number).read_bytes())
        return parts, tallies

    def _slices(self, parts: list[TokenisedPart], *, held_out: bool) -> list[PartSlice]:
        slices = (part.documents_slice(held_out=held_out) for part in parts)
        return [part_slice for part_slice in slices if part_slice.length]

    def _stream(self, domain: str, parts: list[TokenisedPart], *, held_out: bool) -> TokenStream:
        is_chat = source_of(domain) in self._data_spec.chat_sources
        dtype = conversation_dtype(self._token_bytes) if is_chat else token_dtype(self._token_bytes)
        return TokenStream(self._staging.parts_path, self._slices(parts, held_out=held_out), dtype)

    def _plan_shards(self, domain: str, parts: list[TokenisedPart]) -> Sequence[ShardPlan | RowPlan]:
        if self._has_rows:
            return plan_row_shards(domain, parts, self._data_spec.seq_len * self._token_bytes)
        return plan_shards(domain, self._stream(domain, parts, held_out=False), self._data_spec, self._token_bytes)

    def _write_validation(
        self, settings: PackingSettings, by_domain: dict[str, list[TokenisedPart]], shards: dict[str, list[Shard]]
    ) -> FinishResult:
        held_out = {
            name: self._slices(by_domain[name], held_out=True)
            if self._has_rows
            else self._stream(name, by_domain[name], held_out=True)
            for name in sorted(by_domain)
        }
        task = ray.remote(finish).options(num_cpus=1)
        result: FinishResult | None = ray.get(task.remote(settings, held_out, shards, self._spec))
        if result is None:
            fix = "raise data.validation_samples or add documents with texts"
            raise DataError("validation", "no selected held-out sample has a text", fix)
        return result

    def _write_shards(
        self, settings: PackingSettings, by_domain: dict[str, list[TokenisedPart]]
    ) -> dict[str, list[ShardResult]]:
        plans = [plan for name, parts in by_domain.items() for plan in self._plan_shards(name, parts)]
        task = partial(_write_shard, settings=settings)
        self._report.shards, self._report.total_shards = 0, len(plans)
        self._report.enter_stage("packing")
        shard_results: dict[str, list[ShardResult]] = {name: [] for name in by_domain}
        rows = [{"plan": pickle.dumps(plan)} for plan in plans]
        # With a block for each plan, Ray Data runs a task for each shard.
        for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(task).iter_rows():
            shard: ShardResult = pickle.loads(row["result"])
            shard_results[shard.domain].append(shard)
            self._report.shards += 1
            self._report.refresh()
        return {name: sorted(shards, key=lambda result: result.number) for name, shards in shard_results.items()}
