"""Fixtures of the tests of batch inference: a run with a chat template, and the answers of its server."""

import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI

from mhmoe_ray.checkpoint.manifest import MANIFEST
from mhmoe_ray.runs.directory import RunDir, mark_imported
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.batch.input import check_rows, open_input
from mhmoe_ray.serving.batch.output import BatchOutput
from mhmoe_ray.serving.batch.pipeline import read_chunks
from mhmoe_ray.serving.batch.request import BatchRequest, InputFile
from mhmoe_ray.serving.batch.worker import BLOCK_COLUMN, ChunkResult, ChunkWorker
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.serving.sampling import SamplingParams
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import describe_file

from ..asking import call
from ..conftest import build_model, build_tokenizer, save_checkpoint

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'critic' %}{{ raise_exception('no critics here') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
GREEDY = SamplingParams(max_tokens=12, temperature=0)
PROMPTS = ["the quick brown", "", "über größte", "日本", "🦊🐕", "lazy dog\nthe fox ", " jumps", 'a "quoted" one']


@pytest.fixture(scope="session")
def batch_run(tmp_path_factory) -> RunDir:
    """Return a run with one checkpoint, a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("batch") / "runs" / "tiny-abc123"
    folder.mkdir(parents=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    save_checkpoint(folder, 1, build_model())
    run = RunDir(folder)
    run.chat_template_file.write_text(TEMPLATE)
    mark_imported(run)
    return run


@pytest.fixture(scope="session")
def batch_checkpoint(batch_run) -> Path:
    [checkpoint] = batch_run.checkpoints.iterdir()
    return checkpoint


@pytest.fixture(scope="session")
def server(batch_checkpoint) -> Iterator[FastAPI]:
    """Return the HTTP application that serves the run."""
    spec = ServeSpec(max_concurrency=32, max_waiting=1000)
    answerer = load_answerer(batch_checkpoint, spec)
    yield create_app(answerer, "tiny", spec)
    answerer.engine.close()


def served(server: FastAPI, path: str, **body: Any) -> dict[str, Any]:
    """Return the response of the server to a request."""
    response: httpx.Response = call(server, "POST", path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def served_texts(server: FastAPI, prompts: Sequence[str], **body: Any) -> list[str]:
    """Return the texts with which the server answers prompts, in requests of as many prompts as it takes."""
    texts = []
    for start in range(0, len(prompts), 128):
        response = served(server, "/v1/completions", prompt=list(prompts[start : start + 128]), **body)
        texts += [choice["text"] for choice in response["choices"]]
    return texts


def write_input(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSON lines or as a Parquet file, as the suffix of the path says, and return the path."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_output(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of all files of answers in a folder, in the order of their names."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("chunk-*")):
        if path.suffix == ".parquet":
            rows += pq.read_table(path).to_pylist()
        else:
            rows += [json.loads(line) for line in path.read_bytes().splitlines()]
    return rows


def make_request(
    input_path: Path, checkpoint: Path, sampling: SamplingParams = GREEDY, chunk_rows: int = 5
) -> BatchRequest:
    """Check all rows of a file, and return a request for the answers to them."""
    source = open_input(str(input_path))
    rows = check_rows(source, sampling.logprobs is not None)
    input_file = InputFile(
        path=str(input_path),
        format=source.format,
        sha256=describe_file(input_path).sha256,
        rows=rows.row_count,
        first_chat=rows.first_chat,
    )
    return BatchRequest(
        checkpoint=str(checkpoint),
        manifest_sha256=describe_file(checkpoint / MANIFEST).sha256,
        input=input_file,
        sampling=sampling,
        engine="torch",
        precision="float32",
        chunk_rows=chunk_rows,
    )


def answer_here(request: BatchRequest, folder: Path, spec: ServeSpec | None = None) -> list[ChunkResult]:
    """Answer all missing chunks of a request into a folder, one after another, with a worker in this process."""
    output = BatchOutput(folder)
    worker = ChunkWorker(request, spec or ServeSpec(max_concurrency=8), output)
    blocks = read_chunks(pa.table({}), request=request, missing_chunks=frozenset(output.missing_chunks(request)))
    results = [worker(block) for block in blocks]
    return [pickle.loads(content) for result in results for content in result[BLOCK_COLUMN].to_pylist()]
