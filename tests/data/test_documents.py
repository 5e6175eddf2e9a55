"""Tests of the documents of a step and the steps of a document, with oracles that compute both from the raw text."""

import gzip
import json
import random
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

import mhmoe_ray as mh
from mhmoe_ray.api.documents import read_by_run
from mhmoe_ray.api.run import Run
from mhmoe_ray.data.documents import documents_of_step
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.data.shards.columns import padding_token
from mhmoe_ray.data.shards.copy import copy_folder
from mhmoe_ray.data.shards.documents import index_file
from mhmoe_ray.data.shards.manifest import require_data_manifest
from mhmoe_ray.data.stream import StreamLayout
from mhmoe_ray.data.tokenizer import END_OF_TEXT
from mhmoe_ray.errors import DataError
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.runs.start import Ancestor, StartRecord, write_start
from mhmoe_ray.spec import RunSpec, dump_spec
from mhmoe_ray.train.objectives.next_token import sample_digest
from mhmoe_ray.train.worker import combine_digests
from tests.cli.conftest import write_spec
from tests.cli.run import assert_one_line, mhmoe
from tests.data.texts import make_documents, write_documents
from tests.faults import harness
from tests.support.cluster_jobs import run_on_cluster
from tests.support.events import WORKER, append_line, record
from tests.support.runs import mark_submitted
from tests.support.specs import tiny_spec
from tests.support.watch import wait_for_end

pytestmark = pytest.mark.ray

STEPS, BRANCH_STEP, MARK = 40, 23, "the marked line"
GROUPS = {
    "plain": [(0, 1), (7, 4), (5, 2), (30, 4)],
    "parts": [(0, 2), (9, 1)],
    "branch": [(0, 4), (3, 2)],
    "fitted": [(0, 4)],
}
"""Last step before each worker group, and its workers; the second group of `plain` repeats two steps with others."""


def write_raw(folder: Path) -> None:
    """Write raw text in five kinds of files, with blank lines, and a marked line in the middle of a document."""
    write_documents(folder / "raw/a/one.jsonl", make_documents("a-one", 50, words=20))
    lines = (folder / "raw/a/one.jsonl").read_text().replace("\n", "\n\n", 7)
    (folder / "raw/a/one.jsonl").write_text(lines)
    write_documents(folder / "raw/a/two.jsonl.zst", make_documents("a-two", 25, words=5))
    write_documents(folder / "raw/b/three.jsonl.gz", make_documents("b-three", 30, words=60))
    (folder / "table/c").mkdir(parents=True)
    pq.write_table(pa.table({"text": make_documents("c-four", 40, words=30)}), folder / "table/c/four.parquet")
    texts = [f"{text}\nsecond line of {i}" for i, text in enumerate(make_documents("notes", 30, words=12))]
    texts[17] = texts[17].replace("\n", f"\n{MARK}\n")
    (folder / "notes").mkdir()
    (folder / "notes/notes.txt").write_text("\n----\n".join(texts))
    write_documents(folder / "more/d/five.jsonl", make_documents("d-five", 30, words=25))


@lru_cache
def read_raw(folder: Path, file: str) -> dict[int, str]:
    """Return the texts of a raw file by the line or row at which they begin."""
    path = folder / file
    if path.suffix == ".parquet":
        return dict(enumerate(pq.read_table(path)["text"].to_pylist(), 1))
    if path.suffix == ".txt":
        texts, line = {}, 1
        for text in path.read_text().split("\n----\n"):
            texts[line] = text
            line += text.count("\n") + 2
        return texts
    content = pa.input_stream(str(path)).read() if path.suffix == ".zst" else path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    return {n: json.loads(line)["text"] for n, line in enumerate(content.split(b"\n"), 1) if line}


FILES = {
    "web/a": ["raw/a/one.jsonl", "raw/a/two.jsonl.zst"],
    "web/b": ["raw/b/three.jsonl.gz"],
    "table/c": ["table/c/four.parquet"],
    "notes/all": ["notes/notes.txt"],
    "more/d": ["more/d/five.jsonl"],
}


class Case(NamedTuple):
    """A run that looks as if it had been trained, and what each of its steps and ranks read."""

    run: Run
    documents_read: dict[tuple[int, int], list[tuple]]
    """Position, domain, sample, file, line and targets of the documents of a step and rank."""


def make_run(name: str, spec: RunSpec) -> Run:
    """Record the history of a run that nobody trained."""
    run = create_run(spec)
    mark_submitted(run)
    for number, (step, workers) in enumerate(GROUPS[name], 1):
        record(run, "started", group=number, step=step, workers=[WORKER] * workers)
        end = 8 if (name, number) == ("plain", 2) else STEPS
        for done_step in range(step + 1, end + 1):
            append_line(run, done_step, group=number)
    return Run(run)


def compute_reads(folder: Path, name: str, spec: RunSpec, earlier_counts: dict[str, int] | None = None) -> dict:
    """Compute what each step and rank of a run read, from its samples and the raw text."""
    tokenizer = Tokenizer.from_file(str(spec.data.prepared / "tokenizer.json"))
    owners = {
        domain: owners_of(folder, tokenizer, domain, spec)
        for domain in require_data_manifest(spec.data.prepared).domains
    }
    samples, size, b = TrainingSamples(spec, earlier_counts), spec.samples_per_step, spec.train.micro_batch_size
    documents_read = {}
    for step, workers in GROUPS[name]:
        layout = StreamLayout(workers, b, micro_batches=3)
        rows = np.arange(-(-(STEPS - step) * size // (layout.block_rows * workers)) * layout.block_rows * workers)
        positions, ranks = step * size + layout.positions(rows), rows // layout.block_rows % workers
        for position, rank in sorted(zip(positions.tolist(), ranks.tolist(), strict=True)):
            if position == step * size:
                documents_read = {key: value for key, value in documents_read.items() if key[0] <= step}
            if position < STEPS * size:
                domain, sample = samples.locate_sample(position)
                tokens = samples.read(np.array([position]))[0]
                sample_documents = owners[domain](sample, tokens)
                documents_read.setdefault((position // size + 1, rank), []).extend(
                    (position, domain, sample, *f) for f in sample_documents
                )
    return documents_read


def owners_of(folder: Path, tokenizer: Tokenizer, domain: str, spec: RunSpec):
    """Return a function of a sample and its tokens that returns file, line and targets of its documents."""
    start, padding = tokenizer.token_to_id(END_OF_TEXT), padding_token(2)
    documents = [
        (str(folder / file), line, [start, *tokenizer.encode(text).ids])
        for file in FILES[domain]
        for line, text in read_raw(folder, file).items()
        if not is_validation(text, 0.2)
    ]
    stream = np.concatenate([ids for *_, ids in documents])
    owner = np.repeat(np.arange(len(documents)), [len(ids) for *_, ids in documents])
    by_ids = {tuple(ids): (file, line) for file, line, ids in documents}

    def concat(sample, tokens):
        window = slice(sample * 16, (sample + 1) * 16)
        assert np.array_equal(tokens[:-1], stream[window])
        numbers, counts = np.unique(owner[window], return_counts=True)
        return [(*documents[n][:2], int(count)) for n, count in zip(numbers, counts, strict=True)]

    def best_fit(sample, tokens):
        unpadded = tokens[tokens != padding][:-1]
        pieces = np.split(unpadded, np.flatnonzero(unpadded == start))[1:]
        return [(*by_ids[tuple(piece.tolist())], len(piece)) for piece in pieces]

    return concat if spec.data.packing == "concat" else best_fit


@pytest.fixture(scope="module")
def cases(tmp_path_factory, local_cluster) -> dict[str, Case]:
    """Prepare three folders in a job of tiny chunks, and return cases with mixtures, parts, a branch and best fit."""
    folder = tmp_path_factory.mktemp("documents")
    write_raw(folder)
    sources = {
        "web": {"path": "raw", "alpha": 0.5},
        "table": {"path": "table", "weight": 0.3},
        "notes": {"path": "notes", "delimiter": "----"},
    }
    data = {"sources": sources, "validation_fraction": 0.2}
    train = {"steps": STEPS, "micro_batches": 4, "micro_batch_size": 3}
    schedule = [
        {"from_step": 11, "sources": {"web": {"weight": 0.2, "shares": {"a": 3, "b": 1}}, "notes": {"weight": 1}}}
    ]
    parts = {
        "prose": {"sources": ["web", "table"], "micro_batch_size": 2},
        "notes": {"sources": ["notes"], "micro_batch_size": 1},
    }
    branch_data = {**data, "sources": {**sources, "more": {"path": "more"}}, "prepared": "more-prepared"}
    branch_data["tokenizer"] = "prepared/tokenizer.json"
    specs = {
        "plain": tiny_spec(folder, name="plain", data={**data, "schedule": schedule}, train=train),
        "parts": tiny_spec(folder, name="parts", data={**data, "parts": parts}, train=train),
        "branch": tiny_spec(folder, name="branch", data=branch_data, train={**train, "micro_batches": 8}),
        "fitted": tiny_spec(
            folder,
            name="fitted",
            data={**data, "prepared": "fitted", "packing": "best_fit", "seq_len": 320},
            train=train,
        ),
    }
    args = []
    for name in ("plain", "branch", "fitted"):
        (folder / f"{name}.yaml").write_text(dump_spec(specs[name]))
        args += ["serially", folder / f"{name}.yaml"]
    run_on_cluster(local_cluster, "tests.data.prepare.in_one_job", *args)
    result = {
        name: Case(make_run(name, spec), compute_reads(folder, name, spec))
        for name, spec in specs.items()
        if name != "branch"
    }
    # The branch goes on in each domain where the plain run was at this step.
    plain = result["plain"]
    earlier_counts = defaultdict[str, set](set)
    for (step, _), documents_read in plain.documents_read.items():
        for position, domain, *_ in documents_read if step <= BRANCH_STEP else ():
            earlier_counts[domain].add(position)
    counts = {domain: len(positions) for domain, positions in earlier_counts.items()}
    result["branch"] = Case(
        make_run("branch", specs["branch"]), compute_reads(folder, "branch", specs["branch"], counts)
    )
    checkpoint = plain.run.path / "checkpoints" / f"step_{BRANCH_STEP:08}.1"
    ancestor = Ancestor(name=plain.run.id, path=str(checkpoint), step=BRANCH_STEP, tokens=9)
    start = StartRecord(how="copy", optimizer=True, ancestors=[ancestor], samples_before=counts)
    write_start(result["branch"].run.directory, start)
    return result


def test_the_documents_of_a_step_are_those_that_its_workers_read(cases):
    """1,000 random draws of a run, a step and a rank."""
    generator = random.Random(0)
    readings = {name: read_by_run(case.run.directory) for name, case in cases.items()}
    for _ in range(1000):
        case = cases[name := generator.choice(sorted(cases))]
        step, rank = generator.choice(sorted(case.documents_read))
        expected = case.documents_read[step, rank]
        documents = documents_of_step(readings[name], step, rank)
        assert [(d.position, d.domain, d.sample, d.file, d.line) for d in documents] == [e[:5] for e in expected]
        targets = sum(e[5] for (s, _), entries in case.documents_read.items() if s == step for e in entries)
        assert [d.weight * targets for d in documents] == pytest.approx([e[5] for e in expected])
        folder = case.run.spec.data.prepared.parent
        for document in documents:
            text = read_raw(folder, str(Path(document.file).relative_to(folder)))[document.line]
            assert text.startswith(document.text) if document.begins else document.text in text


@pytest.mark.parametrize("name", ["plain", "parts", "branch", "fitted"])
def test_a_document_is_found_at_exactly_the_steps_that_read_it(cases, name):
    case, folder = cases[name], cases[name].run.spec.data.prepared.parent
    expected = defaultdict(list)
    runs = {case.run.id: (case, STEPS)}
    if name == "branch":
        runs[cases["plain"].run.id] = (cases["plain"], BRANCH_STEP)
    for run, (read_case, last_step) in runs.items():
        for (step, rank), entries in sorted(read_case.documents_read.items()):
            for position, domain, sample, file, line, _ in entries if step <= last_step else ():
                expected[file].append((run, step, rank, position, domain, sample, file, line))
    for file in expected:
        assert sorted(case.run.find_document(file)) == sorted(expected[file])
        relative = str(Path(file).relative_to(folder))
        for line in random.Random(1).sample(sorted({e[7] for e in expected[file]}), 5):
            reads = case.run.find_document(relative, line)
            assert sorted(reads) == sorted(e for e in expected[file] if e[7] == line)
    # The epochs of the smallest domains are short, so documents were read several times.
    assert max(map(len, expected.values())) > 60


def test_a_marked_line_is_found_where_the_samples_have_it(cases):
    case = cases["fitted"]
    text = (case.run.spec.data.prepared.parent / "notes/notes.txt").read_text()
    [line] = [number for number, content in enumerate(text.split("\n"), 1) if content == MARK]
    with_mark = {d.position for step in range(1, STEPS + 1) for d in case.run.documents_at(step) if MARK in d.text}
    assert {read.position for read in case.run.find_document("notes.txt", line)} == with_mark != set()


def test_folders_without_an_index_answer_with_domains_and_texts(cases, tmp_path):
    case = cases["plain"]
    folder, spec = tmp_path / "prepared", case.run.spec
    *_, progress = copy_folder(spec.data.prepared, folder)
    shards = [shard for domain in require_data_manifest(folder).domains.values() for shard in domain.shards]
    assert progress.copied_bytes > sum(index_file(folder / shard.file).stat().st_size for shard in shards)
    for shard in shards:
        index_file(folder / shard.file).unlink()
    data = spec.data.model_copy(update={"prepared": folder})
    old_run = make_run("plain", spec.model_copy(update={"data": data, "storage": tmp_path}))
    expected = case.run.documents_at(STEPS)
    assert old_run.documents_at(STEPS) == [d._replace(file=None, line=None) for d in expected]
    with pytest.raises(DataError, match=r"has no index of documents, because .*mhmoe data copy FOLDER"):
        old_run.find_document("one.jsonl")
    list(copy_folder(spec.data.prepared, folder))
    assert old_run.documents_at(STEPS) == expected
    file, other_file = (index_file(folder / shard.file) for shard in shards[:2])
    for content in (other_file.read_bytes(), b"no index"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"it is of another shard|it cannot be read"):
            old_run.find_document("one.jsonl")


def test_mistakes_are_one_line(cases):
    run = cases["plain"].run
    folder = run.path.parent.parent
    for name, code, parts in (
        (f"{run.id}@{STEPS + 1}", 7, [f"has done {STEPS} steps", f"name a step from 1 to {STEPS}"]),
        (f"{run.id}@8:4", 7, ["had 2 workers", "name a rank from 0 to 1"]),
        ("unknown@1", 7, ["there is no such run"]),
    ):
        assert_one_line(mhmoe(folder, "data", "at", name), code, *parts)
    assert mhmoe(folder, "data", "at", run.id).code == 2
    for document in ("nowhere.jsonl", "one.jsonl:2", "one.jsonl:9999"):
        assert_one_line(mhmoe(folder, "data", "find", run.id, document), 4, document, "in no training sample of run")
    table = mhmoe(folder, "data", "at", f"{run.id}@8:1").out
    assert "raw/a/one.jsonl:" in table or "notes.txt:" in table
    read = run.find_document("three.jsonl.gz")[0]
    assert f"three.jsonl.gz:{read.line}" in mhmoe(folder, "data", "find", run.id, f"three.jsonl.gz:{read.line}").out


@pytest.mark.slow
def test_the_digests_of_a_run_follow_from_its_documents(local_cluster, tmp_path):
    """Two workers train six steps, then one trains six more; each digest is computed from texts of the raw files."""
    write_documents(tmp_path / "raw/a/one.jsonl", make_documents("a", 60, words=20))
    data = {"packing": "best_fit", "seq_len": 320}
    write_spec(tmp_path, data=data, train={"steps": 6, "validate_every": 6, "checkpoint_every": 6})
    directory = harness.submit(tmp_path)
    wait_for_end(directory)
    changes = ("--set", "cluster.workers=1", "--set", "cluster.ep=1")
    assert mhmoe(tmp_path, "resume", directory.id, "--until", "12", *changes).code == 0
    wait_for_end(directory)
    spec, texts = directory.spec(), read_raw(tmp_path, "raw/a/one.jsonl")
    tokenizer = Tokenizer.from_file(str(spec.data.prepared / "tokenizer.json"))
    start, b = tokenizer.token_to_id(END_OF_TEXT), spec.train.micro_batch_size
    lines = history.read(directory)
    assert [line[metrics.STEP] for line in lines] == list(range(1, 13))
    ranks = set()
    for line in lines:
        rows = defaultdict(list)
        documents = mhmoe(tmp_path, "data", "at", f"{directory.id}@{line[metrics.STEP]}", "--json").json()
        for document in documents:
            assert document["begins"]
            rows[document["position"]] += [start, *tokenizer.encode(texts[document["line"]]).ids]
        samples = np.full((spec.samples_per_step, 321), padding_token(2), "<u2")
        for row, position in enumerate(sorted(rows)):
            samples[row, : len(rows[position]) + 1] = [*rows[position], start]
        micro_batches = samples.reshape(-1, b, 321)
        assert combine_digests(map(sample_digest, micro_batches)) == line[metrics.STREAM]
        ranks.add((line[metrics.STEP] > 6, *sorted({document["rank"] for document in documents})))
    assert ranks == {(False, 0, 1), (True, 0)}
    for text_line in random.Random(2).sample(sorted(texts), 5):
        steps = {
            line[metrics.STEP]
            for line in lines
            if text_line in [d.line for d in mh.find_run(str(directory.path)).documents_at(line[metrics.STEP])]
        }
        if is_validation(texts[text_line], 0.2):
            assert not steps
            continue
        reads = mhmoe(tmp_path, "data", "find", directory.id, f"one.jsonl:{text_line}", "--json").json()
        assert {read["step"] for read in reads} == steps
