"""The data pipeline on a real cluster."""

import base64
import filecmp
import json
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.data.prepare.job import PrepareRequest
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.prepare.work import read_progress
from mhmoe_ray.data.shards.files import ShardReader, padding_token
from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.data.stream import TrainingSamples, validation_samples
from mhmoe_ray.data.tokenizer import END_OF_TEXT, load_tokenizer
from mhmoe_ray.spec import PhaseSpec, RunSpec, SourceMix, dump_spec
from mhmoe_ray.storage import describe_file
from mhmoe_ray.train.worker import sample_digest
from tests.data.shards.test_verify import make_folders, told
from tests.data.texts import write_corpus, write_documents
from tests.specs import tiny_spec

pytestmark = pytest.mark.ray

ALPHA = {"sources": {"web": {"path": "raw", "alpha": 0.5}}, "validation_fraction": 0.2, "seq_len": 16}
TRAIN = {"steps": 60, "micro_batches": 4, "micro_batch_size": 2}


def on_cluster(cluster, *args, ends="SUCCEEDED", **env):
    """Run a module of this Python as a job of the cluster, in our working directory; return the lines that it
    prints."""
    connection, job = connect(cluster.address), f"test-{secrets.token_hex(4)}"
    environment = {"env_vars": {"PYTHONPATH": str(Path.cwd()), **env}}
    jobs.submit(connection, jobs.request(["-m", *map(str, args)], job, local=True, runtime_env=environment))
    lines = list(jobs.follow_logs(connection, job))
    assert jobs.status(connection, job) == ends, "\n".join(lines)
    return lines


def in_folder(spec, folder, **data):
    """Return the spec of the same preparation into another folder."""
    return spec.model_copy(update={"data": spec.data.model_copy(update={"prepared": folder, **data})})


def assert_same_files(one, other):
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file())
    assert len(names) == 7, names
    assert filecmp.cmpfiles(one, other, names, shallow=False)[1:] == ([], [])


SPELT = [f"{i} <|endoftext|>, they wrote<|endoftext|>" for i in range(40)]


def spelt_spec(folder, **keys):
    """Write documents that spell the end of text, and return a spec of them."""
    write_documents(folder / "raw/a/one.jsonl", SPELT)
    lines = (base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (folder / "ranks").write_bytes(b"".join(lines))
    return tiny_spec(folder, data={"validation_fraction": 0.2, "seq_len": 8, **keys})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write raw text; return its spec and its texts by domain."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = write_corpus(folder / "raw")
    return tiny_spec(folder, data=ALPHA, train=TRAIN), texts


class Killed(NamedTuple):
    """The state that a killed job has left."""

    spec: RunSpec
    made: bool
    """Whether its prepared folder exists."""
    stage: str
    parts: int


@pytest.fixture(scope="module")
def killed(corpus, local_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    spec = in_folder(corpus[0], folder / "again")
    on_cluster(
        local_cluster, "tests.data.prepare.prepare_and_die", 3, ends="FAILED", **PrepareRequest.of(spec).environment
    )
    made = spec.data.prepared.exists()
    [work] = folder.iterdir()
    return Killed(spec, made, read_progress(work).stage, len(list(work.glob("parts/*/*.json"))))


class Made(NamedTuple):
    """The results of the one job that does all tasks."""

    spec: RunSpec
    texts: dict[str, list[str]]
    again: RunSpec
    """The same preparation with one task at a time instead of eight, and many chunks of a file instead of one."""
    fitted: RunSpec
    fitted_again: RunSpec
    spelt: dict[str, RunSpec]
    trained: RunSpec
    """A training on the data of `spec`."""
    splits: list[Path]
    """Files of what workers read of that training."""
    checked: tuple[Path, ...]
    lines: list[str]


STEPS, MIDDLE = 1000, 8 * 437
SPLITS = ["1:0", "2:0", "4:0", f"2:{MIDDLE}", f"4:{MIDDLE}"]
"""Pairs of the number of workers and the position at which they start."""


@pytest.fixture(scope="module")
def made(corpus, killed, local_cluster, tmp_path_factory):
    """Do in a single job all tasks that need no job of their own."""
    folder, (spec, texts) = tmp_path_factory.mktemp("made"), corpus
    again = in_folder(spec, folder / "again")
    fitted = in_folder(spec, folder / "fitted", packing="best_fit", seq_len=300)
    fitted_again = in_folder(fitted, folder / "fitted-again")
    spelt = {
        "ranks": spelt_spec(folder / "ranks", tokenizer="ranks", tokenizer_pattern="cl100k"),
        "unigram": spelt_spec(folder / "unigram", tokenizer_model="unigram"),
    }
    schedule = [PhaseSpec(from_step=300, sources={"web": SourceMix(shares={"a": 3, "c": 1})})]
    trained = in_folder(spec, spec.data.prepared, schedule=schedule)
    trained = trained.model_copy(update={"train": spec.train.model_copy(update={"steps": STEPS})})
    checked = make_folders(folder / "checked")
    tasks = [("together", s) for s in (spec, fitted, *spelt.values())]
    tasks += [(split, trained) for split in SPLITS]
    tasks += [("serially", s) for s in (again, fitted_again, killed.spec)]
    args = [arg for found in checked for arg in ("check", found)]
    splits = []
    for number, (how, task) in enumerate(tasks):
        path = folder / f"{number}.yaml"
        path.write_text(dump_spec(task))
        args += [how, path]
        if ":" in how:
            splits.append(path.with_suffix(".json"))
    lines = on_cluster(local_cluster, "tests.data.prepare.in_one_job", *args)
    return Made(spec, texts, again, fitted, fitted_again, spelt, trained, splits, checked, lines)


def test_every_document_is_once_in_training_or_validation(made):
    folder, manifest = made.spec.data.prepared, read_data_manifest(made.spec.data.prepared)
    tokenizer = load_tokenizer(folder / "tokenizer.json", made.spec.model.vocab_size)
    end = tokenizer.token_to_id(END_OF_TEXT)
    held_out_tokens = 0
    for domain, documents in made.texts.items():
        expected = [[end, *tokenizer.encode(t).ids] for t in documents if not is_validation(t, 0.2)]
        entry = manifest.domains[domain]
        assert (entry.documents, entry.validation_documents) == (len(expected), len(documents) - len(expected))
        stream = np.concatenate(expected)
        assert entry.tokens == len(stream) == 1 + entry.samples * 16 + entry.unused_tokens
        read = ShardReader(folder, entry.shards, manifest.token_bytes).read(np.arange(entry.samples))
        assert np.array_equal(read[:, 1:].ravel(), stream[1 : 1 + entry.samples * 16])
        assert entry.text_bytes == sum(len(t.encode()) for t in documents)
        assert (entry.padding, entry.cut_documents) == (0, len(expected))  # none is of 16 tokens
        held = [1 + len(tokenizer.encode(t).ids) for t in documents if is_validation(t, 0.2)]
        assert entry.validation_tokens == sum(held)
        held_out_tokens += sum(held) - bool(held)  # a domain's first token is nobody's target
    tokens, counts = validation_samples(folder, manifest)
    assert int(counts.sum()) == manifest.validation_tokens == held_out_tokens
    assert sum(d.validation_samples for d in manifest.domains.values()) == len(tokens)
    assert tokens.max() < padding_token(manifest.token_bytes)
    assert tokenizer.decode([int(t) for t in tokens[0]], skip_special_tokens=False).startswith(END_OF_TEXT)


def test_baselines_are_sensible(made):
    found = read_data_manifest(made.spec.data.prepared).baselines
    assert 0 < found.bigram < found.unigram_entropy < np.log(300)


def test_the_result_does_not_depend_on_parallelism(made):
    assert_same_files(made.spec.data.prepared, made.again.data.prepared)


def test_a_preparation_that_was_killed_goes_on_and_makes_the_same(killed, made):
    assert not killed.made
    assert killed.stage == "tokenising"
    assert killed.parts >= 3
    [tokens] = re.findall(r"([\d,]+) tokens, ([\d,]+) of them from before", "\n".join(made.lines))
    every, before = (int(figure.replace(",", "")) for figure in tokens)
    assert 0 < before < every
    folder = killed.spec.data.prepared
    assert_same_files(made.spec.data.prepared, folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_two_jobs_at_once_make_the_same_and_leave_nothing(made, local_cluster, tmp_path):
    again = in_folder(made.spec, tmp_path / "again")
    run = partial(
        on_cluster, local_cluster, "tests.data.prepare.prepare_serially", **PrepareRequest.of(again).environment
    )
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(run) for _ in range(2)]:
            job.result()
    assert_same_files(made.spec.data.prepared, again.data.prepared)
    assert list(tmp_path.iterdir()) == [again.data.prepared]


def test_best_fit_keeps_documents_whole_and_counts_every_token(made):
    folder, manifest = made.fitted.data.prepared, read_data_manifest(made.fitted.data.prepared)
    tokenizer = load_tokenizer(folder / "tokenizer.json", made.fitted.model.vocab_size)
    start, padding = tokenizer.token_to_id(END_OF_TEXT), padding_token(manifest.token_bytes)
    for domain, documents in made.texts.items():
        entry = manifest.domains[domain]
        expected = [[start, *tokenizer.encode(t).ids, start] for t in documents if not is_validation(t, 0.2)]
        assert entry.cut_documents == sum(len(d) - 1 > 300 for d in expected) < len(expected)
        read = ShardReader(folder, entry.shards, manifest.token_bytes).read(np.arange(entry.samples))
        assert entry.tokens == entry.samples * 300 - entry.padding == int((read[:, 1:] != padding).sum())
        rows = ["".join(map(chr, row)) for row in read]
        for document in expected:
            if len(document) - 1 <= 300:
                assert any("".join(map(chr, document)) in row for row in rows)
        assert entry.unused_tokens == 0
    assert_same_files(folder, made.fitted_again.data.prepared)


def test_a_thousand_steps_are_the_same_for_any_workers_and_where_their_number_changes(made):
    """The splits have 1, 2 and 4 workers from the start, 2 that go on alone at a step in the middle, and 4 that go on
    there from 2."""
    found = {}
    for path in made.splits:
        found |= json.loads(path.read_text())
    assert list(found) == SPLITS
    positions = np.arange(STEPS * 8).reshape(-1, 2)
    tokens = TrainingSamples(made.trained).read(positions.ravel()).reshape(len(positions), 2, -1)
    expected = [[row.tolist(), sample_digest(t)] for row, t in zip(positions, tokens, strict=True)]
    for pair, workers in found.items():
        world, start = map(int, pair.split(":"))
        wanted = expected[start // 2 :]
        assert len(workers) == world
        for rank, batches in enumerate(workers):
            assert batches[: len(wanted) // world] == wanted[rank::world]
            # What a last block holds beyond the end belongs to nobody.
            assert all(p[0] >= STEPS * 8 for p, _ in batches[len(wanted) // world :])


@pytest.mark.parametrize("kind", ["ranks", "unigram"])
def test_documents_that_spell_the_end_of_text_have_one_start_each(made, kind):
    spec = made.spelt[kind]
    manifest = read_data_manifest(spec.data.prepared)
    tokenizer = load_tokenizer(spec.data.prepared / "tokenizer.json", spec.model.vocab_size)
    assert manifest.tokenizer_sha256 == describe_file(spec.data.prepared / "tokenizer.json").sha256
    domain = manifest.domains["web/a"]
    rows = ShardReader(spec.data.prepared, domain.shards, manifest.token_bytes).read(np.arange(domain.samples))
    stream = np.append(rows[:, :-1].ravel(), rows[-1, -1])
    parts = tokenizer.decode(stream.tolist(), skip_special_tokens=False).split(END_OF_TEXT)
    read = np.split(stream, np.flatnonzero(stream == tokenizer.token_to_id(END_OF_TEXT)))[1:]
    kept = [text for text in SPELT if not is_validation(text, 0.2)]
    assert [tokenizer.decode(ids[1:].tolist()) for ids in read[:-1]] == kept[: len(read) - 1]
    assert len(kept) - 1 <= len(read) <= len(kept) < len(parts)


def test_what_is_much_is_checked_by_tasks_of_the_cluster(made):
    assert [line for line in made.lines if line.startswith(("sound", "prepared file"))] == told(made.checked)
