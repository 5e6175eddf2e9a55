"""Tests of reading pairs of answers, and of packing each into a sample."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.prepare.packing import pack_pairs
from mhmoe_ray.data.shards.columns import DOCUMENT_STARTS, TARGETS, TOKENS, conversation_dtype, single_token
from mhmoe_ray.data.sources import Reason
from tests.data.sources.read import bad_lines, read_source
from tests.data.texts import write_lines

PROMPT_MESSAGES = [{"role": "user", "content": "hi"}]
CHOSEN_ANSWER, REJECTED_ANSWER = ([{"role": "assistant", "content": text}] for text in ("hello", "go away"))
PAIR = {"prompt": "hi", "chosen": "hello", "rejected": "go away"}
LONG = [*PROMPT_MESSAGES, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "bye"}]


def read_records(folder, records):
    write_lines(folder / "a.jsonl", [json.dumps(record).encode() for record in records])
    return read_source(folder, format="preferences")[0]


def answers(item):
    """Return the texts of the targets of the chosen and of the rejected conversation."""
    return ["".join(c.text[slice(*span)] for span in c.spans) for c in (item.conversation, item.rejected)]


def test_all_shapes_of_trl_are_pairs(tmp_path):
    records = [
        PAIR,
        {"prompt": PROMPT_MESSAGES, "chosen": CHOSEN_ANSWER, "rejected": REJECTED_ANSWER},
        {"chosen": PROMPT_MESSAGES + CHOSEN_ANSWER, "rejected": PROMPT_MESSAGES + REJECTED_ANSWER},
        # UltraFeedback has the prompt once more as a text.
        {
            "prompt": "hi",
            "chosen": PROMPT_MESSAGES + CHOSEN_ANSWER,
            "rejected": PROMPT_MESSAGES + REJECTED_ANSWER,
            "score_chosen": 8.0,
        },
        {"prompt": LONG, "chosen": CHOSEN_ANSWER, "rejected": REJECTED_ANSWER},
        {"chosen": LONG + CHOSEN_ANSWER, "rejected": LONG + REJECTED_ANSWER},
    ]
    items = read_records(tmp_path, records)
    assert [answers(item) for item in items] == [["hello", "go away"]] * len(records)
    assert [item.conversation.text for item in items[:4]] == ["User:\nhi\nAssistant:\nhello"] * 4
    assert items[4].conversation == items[5].conversation
    pq.write_table(pa.Table.from_pylist(records[1:2]), tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").unlink()
    [item] = read_source(tmp_path, format="preferences")[0]
    assert (item.conversation, item.rejected) == (items[1].conversation, items[1].rejected)


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        ([], "it is a list, not an object"),
        ({"prompt": "hi", "chosen": "x"}, "no 'chosen' and 'rejected' among 'chosen', 'prompt'"),
        ({"chosen": "x", "rejected": "y"}, "'prompt' is missing, not a text or a list of messages"),
        ({**PAIR, "chosen": 3}, "'chosen' is a number, not a text or a list of messages"),
        ({**PAIR, "rejected": []}, "'rejected' is empty"),
        ({**PAIR, "rejected": "hello"}, "'chosen' and 'rejected' are equal"),
        ({**PAIR, "rejected": " "}, "'rejected': message 1, of the assistant, is empty"),
        (
            {"chosen": PROMPT_MESSAGES + CHOSEN_ANSWER, "rejected": PROMPT_MESSAGES},
            "'rejected' has no message of the role assistant after",
        ),
        ({"chosen": PROMPT_MESSAGES + CHOSEN_ANSWER, "rejected": LONG[2:] + REJECTED_ANSWER}, "share no first message"),
        ({**PAIR, "prompt": [{"role": "user"}]}, "'prompt': the content of message 1 is missing, not a string"),
    ],
)
def test_other_records_are_bad_lines(tmp_path, record, detail):
    items = read_records(tmp_path, [PAIR, record, PAIR])
    assert bad_lines(items) == [(2, Reason.NO_PAIR)]
    assert detail in items[1].message


LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=9)


@given(lengths=LENGTHS, seq_len=st.integers(2, 20))
def test_each_pair_has_a_sample_with_the_beginnings_of_both_conversations(lengths, seq_len):
    sizes = np.array(lengths).ravel()
    tokens = np.zeros(sizes.sum(), conversation_dtype(2))
    tokens[TOKENS] = np.arange(1, len(tokens) + 1)
    starts = np.cumsum(sizes) - sizes
    tokens[DOCUMENT_STARTS][starts] = True
    tokens[TARGETS] = ~tokens[DOCUMENT_STARTS]
    packed = pack_pairs(tokens, seq_len, 0, 65_535)
    padding_count = 0
    for row, pair, pair_starts in zip(packed.samples, lengths, starts.reshape(-1, 2), strict=True):
        cuts = [*np.flatnonzero(row[DOCUMENT_STARTS]), int((row[TOKENS] != 65_535).sum())]
        for number, (length, start) in enumerate(zip(pair, pair_starts, strict=True)):
            piece = row[cuts[number] : cuts[number + 1]]
            assert np.array_equal(piece, tokens[start : start + len(piece)])
            assert min(length, seq_len // 2) <= len(piece) <= length
        assert cuts[2] == min(sum(pair), seq_len)
        assert (row[cuts[2] :] == single_token(tokens.dtype, 65_535)).all()
        padding_count += seq_len - cuts[2]
    assert packed.padding == padding_count
    assert packed.whole_documents == sum(sum(pair) <= seq_len for pair in lengths)
    assert packed.pieces[:, 0].tolist() == packed.pieces[:, 2].tolist() == np.arange(len(lengths)).repeat(2).tolist()
