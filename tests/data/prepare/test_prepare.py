"""Tests of the data pipeline on a real cluster."""

import base64
import filecmp
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import numpy as np
import pytest

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.prepare.job import PrepareRequest
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.prepare.work import read_progress
from mhmoe_ray.data.samples import TrainingSamples, validation_samples
from mhmoe_ray.data.shards.columns import padding_token
from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.data.shards.ranges import CHECKS_SUFFIX
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.data.tokenizer import END_OF_TEXT, load_tokenizer
from mhmoe_ray.spec import PhaseSpec, RunSpec, SourceMix, dump_spec
from mhmoe_ray.spec.cluster import ShardCacheSpec
from mhmoe_ray.storage import ObjectPath, describe_file
from mhmoe_ray.train.objectives.next_token import sample_digest
from tests.data.shards.folders import expected_reports, make_folders
from tests.data.texts import make_documents, write_corpus, write_documents
from tests.support.cluster_jobs import run_on_cluster
from tests.support.s3 import CREDENTIALS
from tests.support.specs import tiny_spec

pytestmark = pytest.mark.ray

ALPHA = {"sources": {"web": {"path": "raw", "alpha": 0.5}}, "validation_fraction": 0.2, "seq_len": 16}
TRAIN = {"steps": 60, "micro_batches": 4, "micro_batch_size": 2}


def spec_in_folder(spec, folder, **data):
    """Return a copy of a spec that prepares into another folder; `data` are changes to its data section."""
    return spec.model_copy(update={"data": spec.data.model_copy(update={"prepared": folder, **data})})


def assert_same_files(first_folder, second_folder):
    """Assert that two prepared folders have the same ten files, with equal contents."""
    names = sorted(str(p.relative_to(first_folder)) for p in first_folder.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(second_folder)) for p in second_folder.rglob("*") if p.is_file())
    assert len(names) == 10, names
    assert filecmp.cmpfiles(first_folder, second_folder, names, shallow=False)[1:] == ([], [])


END_OF_TEXT_DOCUMENTS = [f"{i} <|endoftext|>, they wrote<|endoftext|>" for i in range(40)]


def end_of_text_spec(folder, **keys):
    """Write documents with the text of the end-of-text token in them and a tiktoken file `ranks`; return their spec."""
    write_documents(folder / "raw/a/one.jsonl", END_OF_TEXT_DOCUMENTS)
    lines = (base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (folder / "ranks").write_bytes(b"".join(lines))
    return tiny_spec(folder, data={"validation_fraction": 0.2, "seq_len": 8, **keys})


def few_documents_spec(folder, count):
    """Write JSON lines of `count` documents without a held-out one; return their spec with the default share."""
    texts = [text for text in make_documents("few", 200) if not is_validation(text, 0.01)]
    write_documents(folder / "raw/a/one.jsonl", texts[:count])
    return tiny_spec(folder, data={"seq_len": 4})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write raw text and return its spec and its texts by domain."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = write_corpus(folder / "raw")
    return tiny_spec(folder, data=ALPHA, train=TRAIN), texts


class Results(NamedTuple):
    """Specs that the shared job worked on, and its results."""

    spec: RunSpec
    texts: dict[str, list[str]]
    serial_spec: RunSpec
    """Spec of the data of `spec`, prepared by one task at a time, and in many chunks of a file instead of one."""
    best_fit_spec: RunSpec
    serial_best_fit_spec: RunSpec
    end_of_text_specs: dict[str, RunSpec]
    few_documents_specs: list[RunSpec]
    """Specs of 1 and of 20 documents, of which the default held-out share has none."""
    remote_spec: RunSpec
    """Spec of the data of `spec`, prepared on an object store."""
    training_spec: RunSpec
    """Spec of a training on the data of `spec`."""
    split_paths: list[Path]
    """Files of the batches that the workers of the training of `training_spec` read."""
    remote_split_path: Path
    """File of the batches that two workers read of the data of `remote_spec`."""
    checked_folders: tuple[Path, ...]
    lines: list[str]


STEPS, MIDDLE_POSITION = 1000, 8 * 437
SPLITS = ["1:0", "2:0", f"4:{MIDDLE_POSITION}", f"2:{STEPS * 8}"]
"""Pairs of the number of workers and the position at which they start."""


@pytest.fixture(scope="module")
def results(corpus, local_cluster, tmp_path_factory, s3):
    """Run in a single job all tasks that need no job of their own, and return its results."""
    folder, (spec, texts) = tmp_path_factory.mktemp("made"), corpus
    serial_spec = spec_in_folder(spec, folder / "again")
    best_fit_spec = spec_in_folder(spec, folder / "fitted", packing="best_fit", seq_len=300)
    serial_best_fit_spec = spec_in_folder(best_fit_spec, folder / "fitted-again")
    end_of_text_specs = {
        "ranks": end_of_text_spec(folder / "ranks", tokenizer="ranks", tokenizer_pattern="cl100k"),
        "unigram": end_of_text_spec(folder / "unigram", tokenizer_model="unigram"),
    }
    few_documents_specs = [few_documents_spec(folder / f"few-{count}", count) for count in (1, 20)]
    schedule = [PhaseSpec(from_step=300, sources={"web": SourceMix(shares={"a": 3, "c": 1})})]
    training_spec = spec_in_folder(spec, spec.data.prepared, schedule=schedule)
    training_spec = training_spec.model_copy(update={"train": spec.train.model_copy(update={"steps": STEPS})})
    remote_spec = spec_in_folder(spec, ObjectPath(f"s3://bucket/{token_hex(3)}/prepared?{s3[0]}"))
    remote_training_spec = spec_in_folder(training_spec, remote_spec.data.prepared)
    # No shard fits into the cache, so single rows are read.
    no_cache = {"shard_cache": ShardCacheSpec(path=folder / "cache", size_gb=0)}
    remote_training_spec = remote_training_spec.model_copy(
        update={"cluster": remote_training_spec.cluster.model_copy(update=no_cache)}
    )
    checked_folders = make_folders(folder / "checked")
    tasks = [
        ("together", s) for s in (spec, best_fit_spec, *end_of_text_specs.values(), *few_documents_specs, remote_spec)
    ]
    tasks += [(split, training_spec) for split in SPLITS]
    tasks.append((SPLITS[1], remote_training_spec))
    tasks += [("serially", s) for s in (serial_spec, serial_best_fit_spec)]
    args = [arg for folder_to_check in checked_folders for arg in ("check", folder_to_check)]
    split_paths = []
    for index, (task_name, spec_of_task) in enumerate(tasks):
        path = folder / f"{index}.yaml"
        path.write_text(dump_spec(spec_of_task))
        args += [task_name, path]
        if ":" in task_name:
            split_paths.append(path.with_suffix(".json"))
    *split_paths, remote_split_path = split_paths
    lines = run_on_cluster(local_cluster, "tests.data.prepare.in_one_job", *args, **CREDENTIALS)
    return Results(
        spec,
        texts,
        serial_spec,
        best_fit_spec,
        serial_best_fit_spec,
        end_of_text_specs,
        few_documents_specs,
        remote_spec,
        training_spec,
        split_paths,
        remote_split_path,
        checked_folders,
        lines,
    )


def test_prepare_writes_every_document_once(results):
    folder, manifest = results.spec.data.prepared, read_data_manifest(results.spec.data.prepared)
    tokenizer = load_tokenizer(folder / "tokenizer.json", results.spec.model.vocab_size)
    end = tokenizer.token_to_id(END_OF_TEXT)
    held_out_tokens = 0
    for domain, documents in results.texts.items():
        expected = [[end, *tokenizer.encode(t).ids] for t in documents if not is_validation(t, 0.2)]
        entry = manifest.domains[domain]
        assert (entry.documents, entry.validation_documents) == (len(expected), len(documents) - len(expected))
        stream = np.concatenate(expected)
        assert entry.tokens == len(stream) == 1 + entry.samples * 16 + entry.unused_tokens
        samples = ShardReader(folder, entry.shards, manifest.token_bytes).read(np.arange(entry.samples))
        assert np.array_equal(samples[:, 1:].ravel(), stream[1 : 1 + entry.samples * 16])
        assert entry.text_bytes == sum(len(t.encode()) for t in documents)
        # Every document is longer than a sample of 16 tokens, so each is cut.
        assert (entry.padding, entry.cut_documents) == (0, len(expected))
        held_out_lengths = [1 + len(tokenizer.encode(t).ids) for t in documents if is_validation(t, 0.2)]
        assert entry.validation_tokens == sum(held_out_lengths)
        held_out_tokens += sum(held_out_lengths) - bool(held_out_lengths)  # a domain's first token is never a target
    samples = validation_samples(folder, manifest)
    assert samples.document_starts is None
    assert int(samples.target_mask.sum()) == manifest.validation_tokens == held_out_tokens
    assert sum(d.validation_samples for d in manifest.domains.values()) == len(samples.token_ids)
    assert samples.token_ids.max() < padding_token(manifest.token_bytes)
    # The validation samples of each source, joined in the order of the sources' names, are all validation samples.
    sources = sorted({source_of(name) for name in manifest.domains})
    samples_by_source = [validation_samples(folder, manifest, sources=[source]) for source in sources]
    assert np.array_equal(np.concatenate([part.token_ids for part in samples_by_source]), samples.token_ids)
    assert np.array_equal(np.concatenate([part.target_mask for part in samples_by_source]), samples.target_mask)
    first_text = tokenizer.decode([int(t) for t in samples.token_ids[0]], skip_special_tokens=False)
    assert first_text.startswith(END_OF_TEXT)


def test_prepare_holds_out_something_of_few_documents(results):
    """One of 20 documents is held out, and the end of a sole document."""
    for spec, counts in zip(results.few_documents_specs, [(1, 1), (19, 1)], strict=True):
        manifest = read_data_manifest(spec.data.prepared)
        [domain] = manifest.domains.values()
        assert (domain.documents, domain.validation_documents) == counts
        assert domain.samples
        assert manifest.validation_tokens
        assert all(len(row) == 5 for row in validation_samples(spec.data.prepared, manifest).token_ids)


def test_prepare_computes_plausible_baselines(results):
    baselines = read_data_manifest(results.spec.data.prepared).baselines
    assert 0 < baselines.bigram < baselines.unigram_entropy < np.log(300)


def test_prepare_is_independent_of_parallelism(results):
    assert_same_files(results.spec.data.prepared, results.serial_spec.data.prepared)


def test_prepare_writes_the_same_files_to_an_object_store(results):
    folder, remote_folder = results.spec.data.prepared, results.remote_spec.data.prepared
    names = {name for name in remote_folder.tree_sizes() if not name.endswith(CHECKS_SUFFIX)}
    assert names == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert all((remote_folder / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert [path.name for path in remote_folder.parent.iterdir()] == ["prepared"]


def test_training_reads_the_same_samples_from_an_object_store(results):
    assert results.remote_split_path.read_bytes() == results.split_paths[1].read_bytes()


@pytest.mark.slow  # test_images.py has a preparation that is killed
def test_prepare_resumes_after_a_killed_job(results, local_cluster, tmp_path):
    spec = spec_in_folder(results.spec, tmp_path / "again")
    environment = PrepareRequest.from_spec(spec).environment
    killed_module, next_module = "tests.data.prepare.prepare_and_die", "tests.data.prepare.prepare_serially"
    run_on_cluster(local_cluster, killed_module, 3, expected_status="FAILED", **environment)
    assert not spec.data.prepared.exists()
    [work] = tmp_path.iterdir()
    assert read_progress(work).stage == "tokenising"
    assert len(list(work.glob("parts/*/*.json"))) >= 3
    lines = run_on_cluster(local_cluster, next_module, **environment)
    [tokens] = re.findall(r"([\d,]+) tokens, ([\d,]+) of them from an earlier job", "\n".join(lines))
    all_tokens, reused_tokens = (int(figure.replace(",", "")) for figure in tokens)
    assert 0 < reused_tokens < all_tokens
    assert_same_files(results.spec.data.prepared, spec.data.prepared)
    assert list(tmp_path.iterdir()) == [spec.data.prepared]


@pytest.mark.slow  # test_work.py has the quick tests of staging directories
def test_concurrent_jobs_prepare_the_same_files(results, local_cluster, tmp_path):
    concurrent_spec = spec_in_folder(results.spec, tmp_path / "again")
    run = partial(
        run_on_cluster,
        local_cluster,
        "tests.data.prepare.prepare_serially",
        **PrepareRequest.from_spec(concurrent_spec).environment,
    )
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(run) for _ in range(2)]:
            job.result()
    assert_same_files(results.spec.data.prepared, concurrent_spec.data.prepared)
    assert list(tmp_path.iterdir()) == [concurrent_spec.data.prepared]


def test_prepare_with_best_fit_keeps_short_documents_whole(results):
    folder, manifest = results.best_fit_spec.data.prepared, read_data_manifest(results.best_fit_spec.data.prepared)
    tokenizer = load_tokenizer(folder / "tokenizer.json", results.best_fit_spec.model.vocab_size)
    start, padding = tokenizer.token_to_id(END_OF_TEXT), padding_token(manifest.token_bytes)
    for domain, documents in results.texts.items():
        entry = manifest.domains[domain]
        expected = [[start, *tokenizer.encode(t).ids, start] for t in documents if not is_validation(t, 0.2)]
        assert entry.cut_documents == sum(len(d) - 1 > 300 for d in expected) < len(expected)
        samples = ShardReader(folder, entry.shards, manifest.token_bytes).read(np.arange(entry.samples))
        assert entry.tokens == entry.samples * 300 - entry.padding == int((samples[:, 1:] != padding).sum())
        rows = ["".join(map(chr, row)) for row in samples]
        for document in expected:
            if len(document) - 1 <= 300:
                assert any("".join(map(chr, document)) in row for row in rows)
        assert entry.unused_tokens == 0
    assert_same_files(folder, results.serial_best_fit_spec.data.prepared)


def test_training_stream_is_independent_of_the_number_of_workers(results):
    """Workers read the same micro-batches in turn: 1 or 2 from the first step, 4 from a step in the middle."""
    batches_by_split = {}
    for path in results.split_paths:
        batches_by_split |= json.loads(path.read_text())
    assert list(batches_by_split) == SPLITS
    positions = np.arange(STEPS * 8).reshape(-1, 2)
    tokens = TrainingSamples(results.training_spec).read(positions.ravel()).reshape(len(positions), 2, -1)
    expected = [[row.tolist(), sample_digest(t)] for row, t in zip(positions, tokens, strict=True)]
    for split, workers in batches_by_split.items():
        world_size, start = map(int, split.split(":"))
        expected_batches = expected[start // 2 :]
        assert len(workers) == world_size
        for rank, batches in enumerate(workers):
            assert batches[: len(expected_batches) // world_size] == expected_batches[rank::world_size]
            # The stream ends with a whole block, so it may have samples after the end of the training, which nothing
            # uses.
            assert all(p[0] >= STEPS * 8 for p, _ in batches[len(expected_batches) // world_size :])


@pytest.mark.parametrize("kind", ["ranks", "unigram"])
def test_documents_with_end_of_text_in_them_have_one_start_token(results, kind):
    spec = results.end_of_text_specs[kind]
    manifest = read_data_manifest(spec.data.prepared)
    tokenizer = load_tokenizer(spec.data.prepared / "tokenizer.json", spec.model.vocab_size)
    assert manifest.tokenizer_sha256 == describe_file(spec.data.prepared / "tokenizer.json").sha256
    domain = manifest.domains["web/a"]
    rows = ShardReader(spec.data.prepared, domain.shards, manifest.token_bytes).read(np.arange(domain.samples))
    stream = np.append(rows[:, :-1].ravel(), rows[-1, -1])
    parts = tokenizer.decode(stream.tolist(), skip_special_tokens=False).split(END_OF_TEXT)
    token_documents = np.split(stream, np.flatnonzero(stream == tokenizer.token_to_id(END_OF_TEXT)))[1:]
    training_texts = [text for text in END_OF_TEXT_DOCUMENTS if not is_validation(text, 0.2)]
    assert [tokenizer.decode(ids[1:].tolist()) for ids in token_documents[:-1]] == training_texts[
        : len(token_documents) - 1
    ]
    assert len(training_texts) - 1 <= len(token_documents) <= len(training_texts) < len(parts)


def test_verification_by_tasks_finds_the_same_problems(results):
    assert [line for line in results.lines if line.startswith(("sound", "prepared file"))] == expected_reports(
        results.checked_folders
    )
