"""Tests of a worker in this process: its answers are those of the server."""

import shutil

import pytest

from mhmoe_ray.errors import CheckpointError, DataError, ServeError, StorageError
from mhmoe_ray.serving.engine.sampler import Sampler

from .conftest import GREEDY, PROMPTS, answer_here, make_request, read_output, served, served_texts, write_input

pytestmark = pytest.mark.long

LONG_PROMPT = "the quick brown fox " * 40


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_greedy_answers_are_those_of_the_server(tmp_path, batch_checkpoint, server, suffix):
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    request = make_request(write_input(tmp_path / f"in.{suffix}", rows), batch_checkpoint)
    results = answer_here(request, tmp_path / "out")
    assert [(result.chunk, result.counts.rows, result.error) for result in results] == [(0, 5, None), (1, 3, None)]
    answers = read_output(tmp_path / "out")
    assert [(row["id"], row["prompt"]) for row in answers] == list(enumerate(PROMPTS))
    assert [*answers[0]] == ["id", "prompt", "text", "finish_reason", "prompt_tokens", "tokens", "error"]
    for row in answers:
        response = served(server, "/v1/completions", prompt=row["prompt"], max_tokens=12, temperature=0)
        [choice], usage = response["choices"], response["usage"]
        assert (row["text"], row["finish_reason"], row["error"]) == (choice["text"], choice["finish_reason"], None)
        assert (row["prompt_tokens"], row["tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert sum(result.counts.tokens for result in results) == sum(row["tokens"] for row in answers) > 50


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations_are_answered_as_by_the_server(tmp_path, batch_checkpoint, server, suffix):
    conversations = [
        [{"role": "user", "content": "the quick"}],
        [{"role": "system", "content": "größte"}, {"role": "user", "content": "Übung"}],
        [
            {"role": "user", "content": "fox", "name": "ann"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "dog"},
        ],
    ]
    rows = [{"messages": messages} for messages in conversations]
    sampling = GREEDY.model_copy(update={"logprobs": 2})
    request = make_request(write_input(tmp_path / f"in.{suffix}", rows), batch_checkpoint, sampling)
    assert request.input.first_chat == 1
    answer_here(request, tmp_path / "out")
    answers = read_output(tmp_path / "out")
    for messages, row in zip(conversations, answers, strict=True):
        body = {"messages": messages, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 2}
        [choice] = served(server, "/v1/chat/completions", **body)["choices"]
        assert row["text"] == choice["message"]["content"]
        assert row["logprobs"] == choice["logprobs"]["content"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_scores_of_tokens_are_those_of_the_server(tmp_path, batch_checkpoint, server, suffix):
    sampling = GREEDY.model_copy(update={"logprobs": 3})
    path = write_input(tmp_path / f"in.{suffix}", [{"prompt": prompt} for prompt in PROMPTS])
    answer_here(make_request(path, batch_checkpoint, sampling), tmp_path / "out")
    for row in read_output(tmp_path / "out"):
        body = {"prompt": row["prompt"], "max_tokens": 12, "temperature": 0, "logprobs": 3}
        [choice] = served(server, "/v1/completions", **body)["choices"]
        scores = choice["logprobs"]
        assert [entry["token"] for entry in row["logprobs"]] == scores["tokens"]
        assert [entry["logprob"] for entry in row["logprobs"]] == scores["token_logprobs"]
        tops = [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in row["logprobs"]]
        assert tops == scores["top_logprobs"]


def test_seed_of_a_row_depends_on_the_row_alone(tmp_path, batch_checkpoint, server):
    """Row i has the seed of choice i of the server's answer to a request with the same seed."""
    sampling = GREEDY.model_copy(update={"temperature": 1.0, "top_p": 0.9, "seed": 7})
    path = write_input(tmp_path / "in.jsonl", [{"prompt": "the quick"}] * 20)
    body = {"prompt": "the quick", "max_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 7, "n": 20}
    expected_texts = [choice["text"] for choice in served(server, "/v1/completions", **body)["choices"]]
    assert len(set(expected_texts)) > 10
    for chunk_rows in (3, 20):
        folder = tmp_path / f"out{chunk_rows}"
        answer_here(make_request(path, batch_checkpoint, sampling, chunk_rows), folder)
        assert [row["text"] for row in read_output(folder)] == expected_texts


def test_stop_strings_end_answers_as_in_the_server(tmp_path, batch_checkpoint, server):
    path = write_input(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    full_texts = served_texts(server, PROMPTS, max_tokens=12, temperature=0)
    stop = [text[3:5] for text in full_texts[:2]]
    answer_here(make_request(path, batch_checkpoint, GREEDY.model_copy(update={"stop": stop})), tmp_path / "out")
    texts = [row["text"] for row in read_output(tmp_path / "out")]
    assert texts == served_texts(server, PROMPTS, max_tokens=12, temperature=0, stop=stop)
    assert texts != full_texts


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_row_that_the_model_cannot_take_has_an_error(tmp_path, batch_checkpoint, server, suffix):
    critic = [{"role": "critic", "content": "bad"}]
    rows = [
        {"prompt": "the quick", "messages": None},
        {"prompt": LONG_PROMPT, "messages": None},
        {"prompt": None, "messages": critic},
        {"prompt": "lazy dog", "messages": None},
    ]
    request = make_request(write_input(tmp_path / f"in.{suffix}", rows), batch_checkpoint)
    [result] = answer_here(request, tmp_path / "out")
    assert (result.counts.rows, result.counts.errors) == (4, 2)
    answers = read_output(tmp_path / "out")
    texts = served_texts(server, ["the quick", "lazy dog"], max_tokens=12, temperature=0)
    assert [row["text"] for row in answers] == [texts[0], None, None, texts[1]]
    _, long_row, critic_row, _ = answers
    tokens = long_row["prompt_tokens"]
    assert tokens > 64
    expected_error = f"the prompt: it has {tokens} tokens, and prompt and answer together may have 64"
    assert (long_row["error"], long_row["tokens"], long_row["finish_reason"]) == (expected_error, None, None)
    assert (critic_row["error"], critic_row["prompt_tokens"]) == ("the messages: no critics here", None)


def test_failure_is_part_of_the_result_and_leaves_no_file(tmp_path, batch_run, batch_checkpoint, monkeypatch):
    path = write_input(tmp_path / "in.jsonl", [{"prompt": "a"}] * 2)
    request = make_request(path, batch_checkpoint)
    (tmp_path / "file").touch()
    [result] = answer_here(request, tmp_path / "file" / "out")
    assert isinstance(result.error, StorageError)
    copied_run = tmp_path / "copied"
    shutil.copytree(batch_run.path, copied_run)
    [weights] = copied_run.glob("checkpoints/*/weights/*")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    damaged_request = request.model_copy(update={"checkpoint": str(weights.parent.parent)})
    [result] = answer_here(damaged_request, tmp_path / "out")
    assert isinstance(result.error, CheckpointError)

    def fail(*_):
        raise MemoryError("all of it is taken")

    monkeypatch.setattr(Sampler, "sample", fail)
    [result] = answer_here(request, tmp_path / "out")
    assert isinstance(result.error, ServeError)
    assert "MemoryError: all of it is taken" in str(result.error)
    # A file that was checked may be damaged when it is read again.
    path.write_text('{"prompt": "a"}\n{')
    [result] = answer_here(request, tmp_path / "out")
    assert isinstance(result.error, DataError)
    assert not (tmp_path / "out").exists()
