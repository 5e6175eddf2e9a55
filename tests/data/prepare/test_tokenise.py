"""Tests of the reuse of parts of an earlier job."""

import pytest

from mhmoe_ray.data.prepare.chunks import Chunk
from mhmoe_ray.data.prepare.tokenise import TokenisedChunk, tokenise_chunk
from mhmoe_ray.data.sources import Tally
from mhmoe_ray.data.tokenizer.train import train_bpe


@pytest.fixture
def tokenise(tmp_path):
    """Return a function that tokenises texts as one chunk; it can reuse the parts of its earlier calls."""
    train_bpe(["a boat on the sea"], 300).save(str(tmp_path / "tokenizer.json"))

    def tokenise_texts(*texts, sha256="1", share=0.5) -> TokenisedChunk:
        table = Chunk(0, 0, list(texts), Tally(), False).as_table()
        paths = {"tokenizer": tmp_path / "tokenizer.json", "parts": tmp_path / "parts"}
        row = tokenise_chunk(table, **paths, tokenizer_sha256=sha256, validation_fraction=share, token_bytes=2)
        return TokenisedChunk.from_row({key: value for key, [value] in row.items()})

    return tokenise_texts


def test_tokenise_chunk_reuses_a_part_of_the_same_inputs(tokenise):
    first_result = tokenise("a boat", "the sea")
    assert not first_result.is_reused
    second_result = tokenise("a boat", "the sea")
    assert second_result == first_result._replace(is_reused=True)
    for other_result in (tokenise("a boat"), tokenise("a boatthe", " sea"), tokenise("the sea", "a boat")):
        assert not other_result.is_reused
    assert not tokenise("a boat", "the sea", sha256="2").is_reused
    assert not tokenise("a boat", "the sea", share=0.4).is_reused


def test_tokenise_chunk_replaces_a_damaged_part(tokenise, tmp_path):
    first_result = tokenise("a boat", "the sea")
    [tokens_path] = tmp_path.glob("parts/*/*.tokens")
    content = tokens_path.read_bytes()
    tokens_path.write_bytes(content[:-1])
    assert tokenise("a boat", "the sea") == first_result
    assert tokens_path.read_bytes() == content
    tokens_path.unlink()
    assert tokenise("a boat", "the sea") == first_result
    assert tokens_path.read_bytes() == content
