import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.prepare.packing import cut_concat, plan_concat, whole_documents
from tests.data.prepare.parts import START, documents_of, stream_of

LENGTHS = st.lists(st.lists(st.integers(0, 25), max_size=6), max_size=4)


@given(parts=LENGTHS, seq_len=st.integers(1, 9), rows=st.integers(1, 5), token_bytes=st.sampled_from([2, 4]))
def test_each_token_but_the_first_is_a_target_once(tmp_path_factory, parts, seq_len, rows, token_bytes):
    documents = iter(documents_of([n for part in parts for n in part]))
    tokens = [np.array(sum((next(documents) for _ in part), []), int) for part in parts]
    stream = stream_of(tmp_path_factory.mktemp("parts"), tokens, token_bytes)
    whole = np.concatenate([*tokens, np.empty(0, int)])
    assert len(stream) == len(whole)
    cuts = plan_concat(stream, seq_len, rows)
    assert all(c.samples == rows for c in cuts[:-1])
    made = [cut_concat(c.stream.read(), c.samples, seq_len) for c in cuts]
    samples = max(0, len(whole) - 1) // seq_len
    assert sum(map(len, made)) == samples
    if made:
        found = np.concatenate(made)
        assert found.dtype.itemsize == token_bytes
        assert np.array_equal(found[:, 1:].ravel(), whole[1 : samples * seq_len + 1])
        assert np.array_equal(found[:, 0], whole[: samples * seq_len : seq_len])


@given(parts=LENGTHS, seq_len=st.integers(1, 30), rows=st.integers(1, 3))
def test_whole_documents_are_those_that_lie_within_a_sample(tmp_path_factory, parts, seq_len, rows):
    documents = documents_of([n for part in parts for n in part])
    position, whole = 0, 0
    total = sum(map(len, documents))
    samples = max(0, total - 1) // seq_len
    for document in documents:
        # The sample that has the document's first token as an input.
        sample = position // seq_len
        whole += sample < samples and position + len(document) - 1 <= (sample + 1) * seq_len
        position += len(document)
    each = iter(documents)
    tokens = [np.array(sum((next(each) for _ in part), []), int) for part in parts]
    stream = stream_of(tmp_path_factory.mktemp("parts"), tokens)
    found = sum(whole_documents(c.stream.read(), c.samples, seq_len, START) for c in plan_concat(stream, seq_len, rows))
    assert found == whole


@given(data=st.data(), lengths=st.lists(st.integers(0, 9), max_size=5))
def test_any_stretch_of_a_stream_is_read_across_its_parts(tmp_path_factory, data, lengths):
    tokens = np.arange(sum(lengths)) + 10
    stream = stream_of(tmp_path_factory.mktemp("parts"), np.split(tokens, np.cumsum(lengths)[:-1]) if lengths else [])
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    assert stream.part(start, stop).read().tolist() == tokens[start:stop].tolist()
