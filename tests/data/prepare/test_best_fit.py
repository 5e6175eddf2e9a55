from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.prepare.packing import pack_best_fit, plan_best_fit
from tests.data.prepare.parts import START, documents_of, stream_of

PADDING = 65_535


def packed(lengths, seq_len):
    documents = documents_of(lengths)
    return documents, pack_best_fit(np.array(sum(documents, []), np.uint16), seq_len, START, PADDING)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), seq_len=st.integers(1, 16))
def test_every_token_and_every_end_is_a_target_once_after_what_precedes_it(lengths, seq_len):
    documents, made = packed(lengths, seq_len)
    expected = Counter()
    for document in documents:
        expected.update(zip(document, [*document[1:], START], strict=True))
    found = Counter()
    for row in made.samples.tolist():
        targets = [t for t in row[1:] if t != PADDING]
        assert row[1 : 1 + len(targets)] == targets, "padding is at the end"
        assert targets
        found.update(zip(row, targets, strict=False))
    assert found == expected
    assert made.padding == int((made.samples == PADDING).sum())


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), seq_len=st.integers(1, 16))
def test_documents_that_fit_are_whole(lengths, seq_len):
    documents, made = packed(lengths, seq_len)
    # Between padding at both ends, so that a start token is found on either side of a document.
    rows = [" ".join(map(str, row)) + " " for row in made.samples.tolist()]
    for document in documents:
        if len(document) <= seq_len:
            text = " ".join(map(str, [*document, START])) + " "
            assert any(text in row for row in rows)
    assert made.cut_documents == sum(len(d) > seq_len for d in documents)


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_no_two_samples_would_fit_into_one(lengths):
    """Best fit begins a sample only where no other has room, so at most one is no more than half full."""
    _, made = packed(lengths, 32)
    filled = (made.samples[:, 1:] != PADDING).sum(1)
    assert (filled <= 16).sum() <= 1


def test_ordinary_documents_leave_less_than_a_sample_of_padding():
    lengths = np.random.default_rng(0).lognormal(5, 1, 5000).astype(int)
    documents = [[START] + [2] * n for n in lengths]
    made = pack_best_fit(np.concatenate(documents).astype(np.uint16), 2048, START, PADDING)
    assert made.padding < 2048


@given(lengths=st.lists(st.integers(0, 9), max_size=8), tokens=st.integers(1, 20))
def test_shards_are_of_whole_parts_and_hold_all(tmp_path_factory, lengths, tokens):
    parts = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    stream = stream_of(tmp_path_factory.mktemp("parts"), parts)
    shards = plan_best_fit(stream, tokens)
    assert sum((s.read().tolist() for s in shards), []) == stream.read().tolist()
    assert all(len(s) >= tokens for s in shards[:-1])
    assert all(len(s) > 0 for s in shards)
