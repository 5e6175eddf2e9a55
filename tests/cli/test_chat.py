"""Tests of preparing and training on conversations beside text, from the raw files to the served prompt."""

import json
import re
import shlex

import httpx
import numpy as np
import pyarrow as pa
import pytest

from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.data.chat.template import BUILT_IN_TEMPLATE
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.samples import validation_samples
from mhmoe_ray.data.shards.columns import DOCUMENT_STARTS, TARGETS, TOKENS
from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.data.tokenizer import END_OF_TEXT, load_tokenizer
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import find_run
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec, load_resolved_spec
from tests.cli.audit import assert_samples_in_order
from tests.cli.conftest import write_spec
from tests.cli.run import assert_one_line, mhmoe
from tests.data.texts import make_documents, write_documents, write_lines

HELD_OUT = 0.2


def make_conversations() -> list[list[dict[str, str]]]:
    """Return conversations of one to three exchanges; the last is longer than a sample."""
    conversations = []
    for i in range(40):
        messages = []
        for j in range(1 + i % 3):
            messages.append({"role": "user", "content": f"What is {i} and {j}?"})
            messages.append({"role": "assistant", "content": f"It is {i + j}." + " And more." * (30 if i == 39 else 0)})
        conversations.append(messages)
    return conversations


CONVERSATIONS = make_conversations()


def render_by_hand(messages) -> list[tuple[str, bool]]:
    """Return the pieces of a conversation, and whether each is a target."""
    pieces = []
    for message in messages:
        if message["role"] == "user":
            pieces.append((f"User:\n{message['content']}\nAssistant:\n", False))
        else:
            pieces.append((message["content"] + END_OF_TEXT, True))
    return pieces


def write_chat_project(folder, **data):
    """Write raw text and conversations, and the spec of a tiny model that trains on both."""
    write_documents(folder / "raw/web/a/one.jsonl", make_documents("a", 30))
    write_lines(folder / "raw/talk/en/one.jsonl", [json.dumps({"messages": m}).encode() for m in CONVERSATIONS])
    sources = {"web": {"path": "raw/web"}, "talk": {"path": "raw/talk", "format": "chat"}}
    settings = {"sources": sources, "packing": "best_fit", "seq_len": 128, "validation_fraction": HELD_OUT, **data}
    train = {"steps": 3, "validate_every": 3, "checkpoint_every": 3}
    write_spec(folder, model={"document_masks": True}, data=settings, train=train)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_chat_project(folder)
    return folder


@pytest.fixture(scope="module")
def run(project, local_cluster):
    """Prepare the data and train a run, and return it."""
    result = mhmoe(project, "submit", "spec.yaml")
    assert result.code == 0, result.err
    return find_run(None, project / "runs")


@pytest.mark.ray
def test_prepared_conversations_have_the_targets_that_are_counted_by_hand(run):
    spec = run.spec()
    manifest = read_data_manifest(spec.data.prepared)
    tokenizer = load_tokenizer(spec.data.prepared / "tokenizer.json", spec.model.vocab_size)
    start = tokenizer.token_to_id(END_OF_TEXT)
    assert manifest.chat.turn_ends == [start] == [manifest.chat.start_token]
    held_out_targets, documents, expected_targets = 0, [], []
    for messages in CONVERSATIONS:
        pieces = [(tokenizer.encode(text).ids, is_target) for text, is_target in render_by_hand(messages)]
        target_count = sum(len(ids) for ids, is_target in pieces if is_target)
        if is_validation("\n".join(message["content"] for message in messages), HELD_OUT):
            held_out_targets += target_count
        else:
            documents.append([start, *(token for ids, _ in pieces for token in ids)])
            expected_targets += [token for ids, is_target in pieces if is_target for token in ids]
    talk, web = manifest.domains["talk/en"], manifest.domains["web/a"]
    assert (talk.documents, talk.tokens) == (len(documents), sum(map(len, documents)))
    assert (talk.target_tokens, talk.cut_documents) == (len(expected_targets), 1)
    assert web.target_tokens == web.tokens
    samples = ShardReader(spec.data.prepared, talk.shards, manifest.token_bytes).read(np.arange(talk.samples))
    assert sorted(samples[TOKENS][:, 1:][samples[TARGETS][:, 1:]].tolist()) == sorted(expected_targets)
    # Only documents that fit into a sample are whole, and each begins at a position that the mask marks.
    begun_documents = set()
    for sample in samples:
        for position in np.flatnonzero(sample[DOCUMENT_STARTS]):
            begun_documents |= {len(d) for d in documents if sample[TOKENS][position : position + len(d)].tolist() == d}
    assert begun_documents == {len(document) for document in documents if len(document) <= 128}
    # Shards of plain text have only token ids, as in a folder without conversations.
    assert ShardReader(spec.data.prepared, web.shards, manifest.token_bytes).read(np.arange(1)).dtype == np.uint16
    with pa.memory_map(str(spec.data.prepared / talk.shards[0].file)) as source:
        assert pa.ipc.open_file(source).schema.names == [TOKENS, TARGETS, DOCUMENT_STARTS]
    held_out = validation_samples(spec.data.prepared, manifest)
    talk_rows = slice(0, talk.validation_samples)
    assert held_out.target_mask[talk_rows].sum() == held_out_targets
    assert held_out.target_mask.sum() == manifest.validation_tokens == held_out_targets + web.validation_tokens - 1


@pytest.mark.ray
def test_run_trains_on_targets_and_is_served_with_its_template(run):
    assert_samples_in_order(run)
    last_line = history.read(run)[-1]
    manifest = read_data_manifest(run.spec().data.prepared)
    assert last_line[metrics.VAL_TOKENS] == manifest.validation_tokens
    assert last_line[metrics.TOKENS] < 3 * run.spec().tokens_per_step
    assert run.chat_template_file.read_text() == BUILT_IN_TEMPLATE
    checkpoint, checkpoint_manifest, _ = newest_checkpoint(run)
    # `ends` lists only tokens that end a text in addition to the tokenizer's end tokens.
    assert checkpoint_manifest.ends == []
    answerer = load_answerer(checkpoint, ServeSpec())
    try:
        for messages in CONVERSATIONS:
            for number in range(1, len(messages), 2):
                prompt = "".join(text for text, _ in render_by_hand(messages[:number]))
                ids = answerer.tokenizer.encode(prompt).ids
                assert answerer.encode_chat(answerer.template, messages[:number]) == [answerer.start_token, *ids]
    finally:
        answerer.engine.close()


@pytest.mark.ray
def test_command_and_page_that_are_printed_work_on_the_server(project, run, unused_port):
    words = ("--name", "talk", "--set", f"serve.port={unused_port}")
    try:
        deployed = mhmoe(project, "serve", "deploy", run.id, *words)
        assert deployed.code == 0, deployed.err
        _, url, *_, body = shlex.split(re.search("ask it: (.*)", deployed.out)[1])
        response = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=120)
        assert response.json()["choices"][0]["message"]["role"] == "assistant"
        page_url = re.search("its web page is (.*)", deployed.out)[1]
        assert page_url == f"http://127.0.0.1:{unused_port}/talk/chat"
        assert 'id="message"' in httpx.get(page_url).text
    finally:
        assert mhmoe(project, "serve", "down", "talk").code == 0


@pytest.mark.ray
def test_commands_show_targets(project, run):
    prepared = mhmoe(project, "data", "prepare", "spec.yaml")
    assert prepared.code == 0
    assert " targets" in prepared.out.splitlines()[0]
    manifest = read_data_manifest(run.spec().data.prepared)
    assert f"{manifest.validation_tokens:,} held-out targets: unigram entropy" in prepared.out
    assert f"{manifest.domains['talk/en'].target_tokens:,}" in prepared.out
    samples = mhmoe(project, "data", "inspect", "spec.yaml", "--samples", "24", "--json").json()
    assert {sample["domain"] for sample in samples} == {"talk/en", "web/a"}
    for sample in samples:
        for part in sample["parts"]:
            pieces = [(piece["text"], piece["is_target"]) for piece in part["pieces"]]
            if sample["domain"] == "web/a":
                assert all(is_target for _, is_target in pieces)
            elif part["begins"] and part["text"] in {"".join(p for p, _ in render_by_hand(m)) for m in CONVERSATIONS}:
                assert pieces in [render_by_hand(messages) for messages in CONVERSATIONS]
    output = mhmoe(project, "data", "inspect", "spec.yaml", "--samples", "24").out
    assert "\nUser:\nWhat is " in output
    assert "\n{+It is " in output


@pytest.mark.ray
@pytest.mark.slow  # tests/data/sources/test_chat.py tests the reader
def test_record_without_an_answer_stops_the_preparation_in_one_line(tmp_path, local_cluster):
    write_chat_project(tmp_path)
    with (tmp_path / "raw/talk/en/one.jsonl").open("a") as out:
        out.write('{"messages": [{"role": "user", "content": "Anybody?"}]}\n')
    result = mhmoe(tmp_path, "data", "prepare", "spec.yaml")
    line = result.err.splitlines()[-1]
    assert result.code == 4
    assert "one.jsonl line 41: it is not a conversation (it has no message of the role assistant)" in line
    assert not load_resolved_spec(tmp_path / "spec.yaml").data.prepared.exists()


def test_template_that_cannot_be_used_is_one_line_before_a_cluster_starts(tmp_path):
    write_chat_project(tmp_path, chat_template="own.jinja")
    for command in (["submit"], ["data", "prepare"]):
        result = mhmoe(tmp_path, *command, "spec.yaml")
        assert_one_line(result, 4, "chat template", "own.jinja", "No such file", "correct data.chat_template")
    (tmp_path / "own.jinja").write_text("{% for %}")
    result = mhmoe(tmp_path, "submit", "spec.yaml")
    assert_one_line(result, 4, "chat template", "own.jinja", "correct data.chat_template")
    assert "own.jinja" in mhmoe(tmp_path, "plan", "spec.yaml").err


def test_conversations_in_samples_that_are_cut_are_one_line(tmp_path):
    write_chat_project(tmp_path)
    result = mhmoe(tmp_path, "plan", "spec.yaml", "--set", "data.packing=concat")
    assert_one_line(result, 3, "data.packing is concat, which cuts the conversations", "set it to best_fit")
