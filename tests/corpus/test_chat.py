"""Tests of the conversations in the small sample, which `mhmoe data sample` writes by default."""

import json
import re

import pyarrow as pa
import pytest

from mhmoe_ray.corpus.small import write_sample
from mhmoe_ray.data.sources import Document
from tests.data.sources.read import read_source


def remark_letters(conversation) -> str:
    return "".join(re.findall(r"\w+", conversation[0]["content"].casefold()))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Write the small sample and return its folder."""
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder)
    return folder


def read_conversations(folder):
    lines = [line for path in sorted(folder.glob("*.zst")) for line in pa.input_stream(str(path)).read().splitlines()]
    return [json.loads(line)["messages"] for line in lines]


@pytest.mark.long
def test_held_out_conversations_begin_otherwise(sample):
    parts = {part: read_conversations(sample / "chat" / part / "english") for part in ("train", "held-out")}
    remarks = {part: {remark_letters(conversation) for conversation in parts[part]} for part in parts}
    assert not remarks["train"] & remarks["held-out"]
    assert (len(parts["train"]), len(parts["held-out"])) == (1648, 377)
    assert len(remarks["held-out"]) >= 100
    for conversation in (*parts["train"], *parts["held-out"]):
        roles = [message["role"] for message in conversation]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in conversation)


@pytest.mark.long
def test_sample_can_be_read_as_conversations(sample):
    for part in ("train", "held-out"):
        items, tally = read_source(sample / "chat" / part, format="chat")
        assert all(isinstance(item, Document) and item.conversation is not None for item in items)
        assert tally.documents > 1000
    assert (sample / "multilingual" / "german").is_dir()
