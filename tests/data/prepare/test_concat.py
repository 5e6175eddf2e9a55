import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.prepare.packing import count_whole_documents, cut_concat, plan_concat
from tests.data.prepare.parts import START, make_documents, write_stream

LENGTHS = st.lists(st.lists(st.integers(0, 25), max_size=6), max_size=4)


@given(parts=LENGTHS, seq_len=st.integers(1, 9), rows=st.integers(1, 5), token_bytes=st.sampled_from([2, 4]))
def test_concat_makes_every_token_but_the_first_a_target_once(tmp_path_factory, parts, seq_len, rows, token_bytes):
    documents = iter(make_documents([n for part in parts for n in part]))
    tokens = [np.array(sum((next(documents) for _ in part), []), int) for part in parts]
    stream = write_stream(tmp_path_factory.mktemp("parts"), tokens, token_bytes)
    all_tokens = np.concatenate([*tokens, np.empty(0, int)])
    assert len(stream) == len(all_tokens)
    cuts = plan_concat("web/a", stream, seq_len, rows)
    assert all(c.samples == rows for c in cuts[:-1])
    samples_by_cut = [cut_concat(c.tokens.read(), c.samples, seq_len) for c in cuts]
    sample_count = max(0, len(all_tokens) - 1) // seq_len
    assert sum(map(len, samples_by_cut)) == sample_count
    if samples_by_cut:
        samples = np.concatenate(samples_by_cut)
        assert samples.dtype.itemsize == token_bytes
        assert np.array_equal(samples[:, 1:].ravel(), all_tokens[1 : sample_count * seq_len + 1])
        assert np.array_equal(samples[:, 0], all_tokens[: sample_count * seq_len : seq_len])


@given(parts=LENGTHS, seq_len=st.integers(1, 30), rows=st.integers(1, 3))
def test_count_whole_documents_counts_documents_within_a_sample(tmp_path_factory, parts, seq_len, rows):
    documents = make_documents([n for part in parts for n in part])
    position, expected = 0, 0
    total = sum(map(len, documents))
    sample_count = max(0, total - 1) // seq_len
    for document in documents:
        # This is the sample in which the document's first token is an input. The document is whole if it ends there
        # too.
        sample_index = position // seq_len
        expected += sample_index < sample_count and position + len(document) - 1 <= (sample_index + 1) * seq_len
        position += len(document)
    document_iterator = iter(documents)
    tokens = [np.array(sum((next(document_iterator) for _ in part), []), int) for part in parts]
    stream = write_stream(tmp_path_factory.mktemp("parts"), tokens)
    actual = sum(
        count_whole_documents(c.tokens.read(), c.samples, seq_len, START)
        for c in plan_concat("web/a", stream, seq_len, rows)
    )
    assert actual == expected


@given(data=st.data(), lengths=st.lists(st.integers(0, 9), max_size=5))
def test_stream_reads_any_range_across_its_parts(tmp_path_factory, data, lengths):
    tokens = np.arange(sum(lengths)) + 10
    stream = write_stream(
        tmp_path_factory.mktemp("parts"), np.split(tokens, np.cumsum(lengths)[:-1]) if lengths else []
    )
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    assert stream.substream(start, stop).read().tolist() == tokens[start:stop].tolist()
