import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.prepare.baselines import baselines
from mhmoe_ray.data.prepare.pack import pack, pack_validation
from mhmoe_ray.data.shards import files as shards
from mhmoe_ray.data.shards.files import ShardReader, ShardWriter, padding_token, split_padding, token_bytes_for


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 60), max_size=5), seq_len=st.integers(1, 9), token_bytes=st.sampled_from([2, 4]))
def test_packing_makes_each_token_but_the_first_a_target_once(tmp_path_factory, lengths, seq_len, token_bytes):
    folder = tmp_path_factory.mktemp("pack")
    stream = np.arange(sum(lengths), dtype=f"<u{token_bytes}")
    parts = []
    for i, part in enumerate(np.split(stream, np.cumsum(lengths)[:-1])) if lengths else ():
        parts.append(folder / f"{i}.bin")
        part.tofile(parts[-1])
    packed = pack(parts, ShardWriter(folder, "d", seq_len, token_bytes), seq_len, token_bytes)
    reader = ShardReader(folder, packed.shards, token_bytes)
    assert len(reader) == packed.samples == max(0, len(stream) - 1) // seq_len
    assert packed.tokens == len(stream)
    targets = reader.read(np.arange(packed.samples))[:, 1:].ravel() if packed.samples else np.empty(0)
    assert np.array_equal(targets, stream[1 : packed.samples * seq_len + 1])
    assert packed.unused_tokens == max(0, len(stream) - 1) - packed.samples * seq_len < seq_len

    held_out = pack_validation(parts, seq_len, token_bytes)
    predicted = held_out[:, 1:].ravel()
    assert np.array_equal(predicted[predicted != padding_token(token_bytes)], stream[1:])


def test_samples_are_read_in_any_order_from_several_shards_and_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 700)
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 60)
    rows = np.arange(500 * 10).reshape(500, 10) % 60_000
    writer = ShardWriter(tmp_path, "d", 9, 2)
    for part in np.array_split(rows, 7):
        writer.write(part)
    made = writer.close()
    assert [s.rows for s in made] == [35] * 14 + [10]
    reader = ShardReader(tmp_path, made, 2)
    index = np.random.default_rng(0).integers(0, 500, 200)
    assert np.array_equal(reader.read(index), rows[index])


def test_a_vocabulary_leaves_room_for_the_padding_mark():
    assert token_bytes_for(65_535) == 2
    assert token_bytes_for(65_536) == 4
    assert padding_token(2) == 65_535


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_padding_is_token_0_to_a_model_and_counts_as_no_target(token_bytes):
    padding = padding_token(token_bytes)
    stored = np.array([[5, 0, 7, 8], [5, 9, padding, padding]], f"<u{token_bytes}")
    tokens, counts = split_padding(stored, token_bytes)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [[5, 0, 7, 8], [5, 9, 0, 0]]
    assert counts.tolist() == [[True, True, True], [True, False, False]]


def test_baselines_are_those_of_a_count_by_hand():
    train = np.array([[0, 1, 2, 1], [1, 0, 1, 1]])
    validation = np.array([[0, 1, 1, 9], [3, 2, 2, 2]])
    found = baselines(train, validation, vocab_size=4, padding=9)
    # Targets 1 1 2 2 2.
    assert found.unigram_entropy == pytest.approx(-(0.4 * np.log(0.4) + 0.6 * np.log(0.6)))
    # Pairs 01 12 21 10 01 11: successors of 1 are 2, 0, 1; of 2 only 1; 3 is never seen.
    unigram = (np.array([1, 4, 1, 0]) + 1) / 10
    by_hand = [
        (2 + 1 * unigram[1]) / 3,  # 0 -> 1
        (1 + 3 * unigram[1]) / 6,  # 1 -> 1
        (0 + 1 * unigram[2]) / 1,  # 3 -> 2, from frequencies alone
        (0 + 1 * unigram[2]) / 2,  # 2 -> 2
        (0 + 1 * unigram[2]) / 2,
    ]
    assert found.bigram == pytest.approx(-np.log(by_hand).mean())
    assert found.bigram_tokens == 6


def test_the_bigram_model_is_a_distribution():
    rng = np.random.default_rng(1)
    train = rng.integers(0, 6, (20, 5))
    every = np.array([[a, b] for a in range(7) for b in range(7)])
    losses = [baselines(train, pair[None], 7, 99).bigram for pair in every]
    assert np.exp(-np.array(losses)).reshape(7, 7).sum(1) == pytest.approx(np.ones(7))
