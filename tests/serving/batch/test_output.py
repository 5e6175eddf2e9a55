"""Tests of the request and of the output folder, locally and on an object store."""

import pytest

from mhmoe_ray.errors import DataError, StorageError
from mhmoe_ray.serving.batch.job import BatchJob, ProgressReporter, _check
from mhmoe_ray.serving.batch.output import BatchOutput
from mhmoe_ray.serving.batch.rows import AnswerCounts
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import location

from ..conftest import free_port
from .conftest import GREEDY, answer_here, make_request, read_output, served_texts, write_input

PROMPTS = [f"the {i}" for i in range(12)]


@pytest.fixture
def request_of_five(tmp_path, batch_checkpoint):
    """Return a request for the answers to 12 prompts, in chunks of 5."""
    return make_request(write_input(tmp_path / "in.jsonl", [{"prompt": p} for p in PROMPTS]), batch_checkpoint)


def test_missing_chunks_are_answered_and_others_stay(tmp_path, request_of_five, server):
    output = BatchOutput(tmp_path / "out")
    assert output.missing_chunks(request_of_five) == [0, 1, 2]
    answer_here(request_of_five, output.folder)
    contents = {path.name: path.read_bytes() for path in output.folder.iterdir()}
    assert sorted(contents) == ["chunk-00000000.jsonl", "chunk-00000001.jsonl", "chunk-00000002.jsonl"]
    output.chunk_file(request_of_five, 1).unlink()
    assert output.missing_chunks(request_of_five) == [1]
    [result] = answer_here(request_of_five, output.folder)
    assert result.chunk == 1
    assert {path.name: path.read_bytes() for path in output.folder.iterdir()} == contents
    texts = [row["text"] for row in read_output(output.folder)]
    assert texts == served_texts(server, PROMPTS, max_tokens=12, temperature=0)


def test_folder_refuses_another_request_in_one_line(tmp_path, batch_checkpoint, request_of_five):
    output = BatchOutput(tmp_path / "out")
    output.write_request(request_of_five)
    output.check_request(request_of_five, is_first=False)
    other_path = write_input(tmp_path / "other.jsonl", [{"prompt": "b"}])
    other_requests = {
        "temperature 0.0, not 0.5": request_of_five.model_copy(
            update={"sampling": GREEDY.model_copy(update={"temperature": 0.5})}
        ),
        "seed none, not 3, stop none, not ['x']": request_of_five.model_copy(
            update={"sampling": GREEDY.model_copy(update={"seed": 3, "stop": ["x"]})}
        ),
        f"input {tmp_path}/in.jsonl (": make_request(other_path, batch_checkpoint),
        "checkpoint tiny-abc123/step_00000001.1 (": request_of_five.model_copy(update={"manifest_sha256": "0" * 64}),
        "engine torch, not vllm, precision float32, not bfloat16": request_of_five.model_copy(
            update={"engine": "vllm", "precision": "bfloat16"}
        ),
        "chunk_rows 5, not 6": request_of_five.model_copy(update={"chunk_rows": 6}),
    }
    for difference, other_request in other_requests.items():
        # As long as the folder has no answers, a command may replace its request, but a job must have that request.
        output.check_request(other_request, is_first=True)
        with pytest.raises(DataError) as raised:
            output.check_request(other_request, is_first=False)
        assert f"it is for another request: {difference}" in str(raised.value)
    output.write_chunk(request_of_five, 2, b"")
    for other_request in other_requests.values():
        with pytest.raises(DataError, match="it is for another request"):
            output.check_request(other_request, is_first=True)
    moved_input = request_of_five.input.model_copy(update={"path": "/elsewhere/in.jsonl"})
    output.check_request(request_of_five.model_copy(update={"input": moved_input}), is_first=False)


def test_folder_of_something_else_is_refused(tmp_path, request_of_five):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(DataError, match="it is no folder of answers"):
        BatchOutput(tmp_path / "notes").stored_request()
    (tmp_path / "empty").mkdir()
    assert BatchOutput(tmp_path / "empty").stored_request() is None
    output = BatchOutput(tmp_path / "damaged")
    output.write_request(request_of_five)
    output.request_file.write_text("{}")
    with pytest.raises(DataError, match="it is damaged"):
        output.stored_request()


def test_storage_out_of_reach_is_one_line(tmp_path, request_of_five, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    query = f"region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{free_port()}&connect_timeout=1"
    for output in (BatchOutput(location(f"s3://bucket/out?{query}")), BatchOutput(tmp_path / "in.jsonl" / "out")):
        with pytest.raises(StorageError) as raised:
            output.write_request(request_of_five)
        assert str(raised.value).startswith(f"output {output.folder}: ")
        assert "\n" not in str(raised.value)


def test_partial_files_of_killed_workers_are_removed(tmp_path, request_of_five):
    output = BatchOutput(tmp_path / "out")
    answer_here(request_of_five, output.folder)
    (output.folder / ".chunk-00000001.jsonl.0123abcd.partial").touch()
    output.complete(AnswerCounts(rows=12))
    assert sorted(path.name for path in output.folder.iterdir()) == [
        "_summary.json",
        *(f"chunk-0000000{chunk}.jsonl" for chunk in range(3)),
    ]


def test_damaged_chunk_is_one_line(tmp_path, request_of_five):
    output = BatchOutput(tmp_path / "out")
    answer_here(request_of_five, output.folder)
    assert output.count_chunk(request_of_five, 2).rows == 2
    path = output.chunk_file(request_of_five, 0)
    for content, reason in (
        (b"{", "it is damaged"),
        (b"[]\n", "it is damaged"),
        (b"[" * 2000, "it is damaged"),
        (b"", "it has 0 rows, not 5"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            output.count_chunk(request_of_five, 0)


def test_output_may_be_on_an_object_store(s3, request_of_five, server):
    query, _ = s3
    folder = location(f"s3://bucket/batch/out?{query}")
    output = BatchOutput(folder)
    assert output.stored_request() is None
    output.write_request(request_of_five)
    assert output.stored_request() == request_of_five
    answer_here(request_of_five, folder)
    assert output.missing_chunks(request_of_five) == []
    counts = sum((output.count_chunk(request_of_five, chunk) for chunk in range(3)), AnswerCounts())
    output.complete(counts)
    assert output.stored_summary() == counts
    assert counts.rows == 12


def test_input_may_be_on_an_object_store(s3, tmp_path, batch_checkpoint, server):
    query, system = s3
    with system.open_output_stream("bucket/batch/in.jsonl") as stream:
        stream.write(b'{"prompt": "the quick"}\n{"prompt": "lazy"}\n')
    uri = f"s3://bucket/batch/in.jsonl?{query}"
    local_request = make_request(write_input(tmp_path / "a.jsonl", [{"prompt": "x"}]), batch_checkpoint)
    input_file = local_request.input.model_copy(update={"path": uri, "rows": 2})
    answer_here(local_request.model_copy(update={"input": input_file}), tmp_path / "out")
    texts = [row["text"] for row in read_output(tmp_path / "out")]
    assert texts == served_texts(server, ["the quick", "lazy"], max_tokens=12, temperature=0)


def test_job_refuses_an_input_that_has_changed(tmp_path, request_of_five):
    output = BatchOutput(tmp_path / "out")
    output.write_request(request_of_five)
    job = BatchJob(request=request_of_five, output=str(output.folder), serve=ServeSpec(), workers=1)
    _check(job)
    (tmp_path / "in.jsonl").write_text('{"prompt": "b"}\n')
    with pytest.raises(DataError, match="it has changed"):
        _check(job)
    (tmp_path / "in.jsonl").unlink()
    with pytest.raises(DataError, match="the job cannot read it: No such file"):
        _check(job)


def test_progress_lines_have_the_speed(monkeypatch):
    clock = 100.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    report = ProgressReporter(10_000, 1_000)
    assert report.line() == "1,000 of 10,000 rows"
    clock = 130.0
    assert report.is_due(1_100)
    assert report.line() == "1,100 of 10,000 rows"
    clock = 132.0
    assert not report.is_due(1_200)
    clock = 140.0
    assert report.is_due(1_300)
    assert report.line() == "1,300 of 10,000 rows, 20.0 rows/s"
    clock = 141.0
    assert report.is_due(10_000)
