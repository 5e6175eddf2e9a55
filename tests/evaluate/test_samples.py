"""Tests of samples of raw text and of conversations."""

import json

import pytest
import torch

from mhmoe_ray.data.chat.encoder import ConversationEncoder
from mhmoe_ray.data.chat.template import BUILT_IN_TEMPLATE, ChatTemplate
from mhmoe_ray.data.sources import FileReader
from mhmoe_ray.data.tokenizer import END_OF_TEXT, DocumentEncoder
from mhmoe_ray.evaluate import measure
from mhmoe_ray.evaluate.measure import conversation_samples, text_samples
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from tests.data.sources.read import data_spec
from tests.data.texts import write_lines
from tests.evaluate.measurements import measure as measure_scores
from tests.serving.conftest import build_tokenizer
from tests.support.specs import tiny_spec


def test_text_samples_opens_no_more_files_than_needed(tmp_path, monkeypatch):
    opened_names = []

    def read_file(file, data):
        opened_names.append(file.path.rpartition("/")[2])
        return FileReader(file, data)

    monkeypatch.setattr(measure, "FileReader", read_file)
    for name in ("a/1", "a/2", "a/3", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text("the cat sat on the mat " * (1 if name == "a/1" else 50))
    domains = list(text_samples(data_spec(tmp_path), DocumentEncoder(build_tokenizer()), 16, 4))
    assert [domain.tokens.shape for domain in domains] == [(4, 17)] * 2
    assert opened_names == ["1.txt", "2.txt", "1.txt"]


def make_chat_samples(folder, count, seq_len, *, is_packed, max_samples=99):
    """Write conversations of one and two exchanges, and return their samples by domain."""
    lines = []
    for i in range(count):
        answer = "the lazy dog " * (i % 4 + 1)
        exchange = [{"role": "user", "content": f"fox {i}?"}, {"role": "assistant", "content": answer}]
        lines.append(chat_line(exchange * (1 + i % 2)))
    write_lines(folder / "a/one.jsonl", lines)
    return read_chat_samples(folder, seq_len, is_packed=is_packed, max_samples=max_samples)


def chat_line(messages):
    """Return a line of a file of conversations."""
    return json.dumps({"messages": messages}).encode()


def read_chat_samples(folder, seq_len, *, is_packed, max_samples):
    """Return the samples of the conversations in a folder, by domain."""
    template = ChatTemplate(BUILT_IN_TEMPLATE, END_OF_TEXT, END_OF_TEXT)
    encoder = ConversationEncoder(build_tokenizer())
    data = data_spec(folder, format="chat")
    assert list(text_samples(data, DocumentEncoder(build_tokenizer()), seq_len, max_samples)) == []
    return list(conversation_samples(data, encoder, template, seq_len, max_samples, is_packed=is_packed))


def test_packed_conversations_have_the_score_of_single_ones(tmp_path):
    """A model with document masks has the same loss on packed conversations as one without has on single ones."""
    [packed], [single] = (make_chat_samples(tmp_path, 12, 160, is_packed=is_packed) for is_packed in (True, False))
    assert len(packed.tokens) < len(single.tokens) == 12
    assert packed.domain == "web/a"
    spec = tiny_spec(model={"moe": None, "d_ff": 48, "vocab_size": 320}).model
    scores = []
    for samples, masks in ((packed, True), (single, False)):
        model = Decoder(spec.model_copy(update={"document_masks": masks}))
        init_weights(model, 3)
        scores.append(measure_scores(model.requires_grad_(False).eval(), [samples], batch=2)[0]["web/a"])
    assert scores[0].tokens == scores[1].tokens == int(single.target_mask.sum())
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-5)
    answer_bytes = sum(len("the lazy dog " * (i % 4 + 1)) - 1 for i in range(12) for _ in range(1 + i % 2))
    tokenizer = build_tokenizer()
    targets = torch.from_numpy(single.tokens[:, 1:][single.target_mask])
    assert len(tokenizer.decode(targets.tolist()).encode()) == answer_bytes


def test_conversation_samples_are_limited_and_cut(tmp_path):
    [samples] = make_chat_samples(tmp_path, 30, 16, is_packed=False, max_samples=5)
    assert samples.tokens.shape == (5, 17)
    assert not samples.document_starts[1:].all()
    [samples] = make_chat_samples(tmp_path, 30, 96, is_packed=True, max_samples=2)
    assert samples.tokens.shape == (2, 97)


@pytest.mark.parametrize("is_packed", [False, True])
def test_samples_without_an_answer_do_not_count(tmp_path, is_packed):
    """A prompt that is longer than a sample fills the first samples of its conversation, which thus have no answer."""
    prompt = [{"role": "user", "content": "fox " * 60}]
    write_lines(tmp_path / "a/one.jsonl", [chat_line([*prompt, {"role": "assistant", "content": "dog"}])] * 2)
    [samples] = read_chat_samples(tmp_path, 48, is_packed=is_packed, max_samples=9)
    assert len(samples.tokens) == 2
    assert samples.target_mask.any(1).all()
