from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.prepare.packing import pack_best_fit, plan_best_fit
from tests.data.prepare.parts import START, make_documents, write_stream

PADDING = 65_535


def pack_documents(lengths, seq_len):
    documents = make_documents(lengths)
    return documents, pack_best_fit(np.array(sum(documents, []), np.uint16), seq_len, START, PADDING)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), seq_len=st.integers(1, 16))
def test_best_fit_makes_every_token_a_target_once(lengths, seq_len):
    documents, packing = pack_documents(lengths, seq_len)
    expected = Counter()
    for document in documents:
        expected.update(zip(document, [*document[1:], START], strict=True))
    actual = Counter()
    for row in packing.samples.tolist():
        targets = [t for t in row[1:] if t != PADDING]
        assert row[1 : 1 + len(targets)] == targets, "padding stands before a token"
        assert targets
        actual.update(zip(row, targets, strict=False))
    assert actual == expected
    assert packing.padding == int((packing.samples == PADDING).sum())


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), seq_len=st.integers(1, 16))
def test_best_fit_keeps_short_documents_whole(lengths, seq_len):
    documents, packing = pack_documents(lengths, seq_len)
    # Each token is followed by a space, so that it does not match the first digits of a longer token.
    rows = [" ".join(map(str, row)) + " " for row in packing.samples.tolist()]
    for document in documents:
        if len(document) <= seq_len:
            text = " ".join(map(str, [*document, START])) + " "
            assert any(text in row for row in rows)
    assert packing.cut_documents == sum(len(d) > seq_len for d in documents)


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_best_fit_leaves_at_most_one_sample_half_empty(lengths):
    """Best fit begins a new sample only if no other has room, so at most one sample is filled to half or less."""
    _, packing = pack_documents(lengths, 32)
    filled_lengths = (packing.samples[:, 1:] != PADDING).sum(1)
    assert (filled_lengths <= 16).sum() <= 1


def test_best_fit_of_ordinary_documents_needs_little_padding():
    lengths = np.random.default_rng(0).lognormal(5, 1, 5000).astype(int)
    documents = [[START] + [2] * n for n in lengths]
    packing = pack_best_fit(np.concatenate(documents).astype(np.uint16), 2048, START, PADDING)
    assert packing.padding < 2048


@given(lengths=st.lists(st.integers(0, 9), max_size=8), min_tokens=st.integers(1, 20))
def test_plan_best_fit_splits_a_stream_between_parts(tmp_path_factory, lengths, min_tokens):
    parts = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    stream = write_stream(tmp_path_factory.mktemp("parts"), parts)
    shards = plan_best_fit(stream, min_tokens)
    assert sum((s.read().tolist() for s in shards), []) == stream.read().tolist()
    assert all(len(s) >= min_tokens for s in shards[:-1])
    assert all(len(s) > 0 for s in shards)
