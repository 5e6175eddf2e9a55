from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.prepare.packing import pack_best_fit, plan_best_fit
from mhmoe_ray.data.shards.columns import DOCUMENT_STARTS, TARGETS, TOKENS, conversation_dtype
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
    assert packing.whole_documents == sum(len(d) <= seq_len for d in documents)


# A conversation is drawn as a mask, which tells for each of its tokens whether it is a target.
CONVERSATIONS = st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=20)


@given(conversations=CONVERSATIONS, seq_len=st.integers(1, 16))
def test_best_fit_makes_each_target_of_conversations_one_once(conversations, seq_len):
    """Start tokens within conversations, such as those at the ends of turns, begin no document and can be targets."""
    documents = []
    for masks, ids in zip(conversations, make_documents([len(masks) - 1 for masks in conversations]), strict=True):
        rows = np.zeros(len(ids), conversation_dtype(2))
        rows[TOKENS], rows[TARGETS] = ids, masks
        # Each second token is a start token, although it begins no document.
        rows[TOKENS][::2] = START
        rows[TARGETS][0], rows[DOCUMENT_STARTS][0] = False, True
        documents.append(rows)
    packing = pack_best_fit(np.concatenate(documents), seq_len, START, PADDING)
    expected, actual = Counter(), Counter()
    for document in documents:
        tokens = document[TOKENS].tolist()
        expected.update((tokens[i - 1], tokens[i]) for i in range(1, len(tokens)) if document[TARGETS][i])
    for sample in packing.samples:
        tokens = sample[TOKENS].tolist()
        actual.update((tokens[i - 1], tokens[i]) for i in range(1, seq_len + 1) if sample[TARGETS][i])
    assert actual == expected
    assert packing.whole_documents == sum(len(d) <= seq_len for d in documents)
    assert packing.padding == int((packing.samples[TOKENS] == PADDING).sum())
    assert not (packing.samples[TOKENS] == PADDING)[packing.samples[TARGETS]].any()


@given(lengths=st.lists(st.integers(0, 39), min_size=1, max_size=20))
def test_best_fit_keeps_conversations_apart(lengths):
    """Each document start in a sample begins a whole document, because every document here fits into a sample."""
    documents = []
    for ids in make_documents(lengths):
        rows = np.zeros(len(ids), conversation_dtype(2))
        rows[TOKENS], rows[DOCUMENT_STARTS] = ids, np.arange(len(ids)) == 0
        documents.append(rows)
    pieces = set()
    for sample in pack_best_fit(np.concatenate(documents), 40, START, PADDING).samples:
        tokens = sample[TOKENS][: 41 - int((sample[TOKENS] == PADDING).sum())].tolist()
        starts = np.flatnonzero(sample[DOCUMENT_STARTS]).tolist()
        assert starts[0] == 0
        pieces |= {tuple(tokens[a:b]) for a, b in pairwise(starts)}
    assert pieces == {tuple(document[TOKENS].tolist()) for document in documents}


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_best_fit_leaves_at_most_one_sample_half_empty(lengths):
    """Best fit begins a new sample only if no earlier one has room, so at most one sample is filled to half or less."""
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
