"""Reuse of parts that an earlier job left."""

import pytest

from mhmoe_ray.data.prepare.chunks import Chunk
from mhmoe_ray.data.prepare.tokenise import Tokenised, tokenise_chunk
from mhmoe_ray.data.sources import Tally
from mhmoe_ray.data.tokenizer.train import train_bpe


@pytest.fixture
def tokenise(tmp_path):
    train_bpe(["a boat on the sea"], 300).save(str(tmp_path / "tokenizer.json"))

    def run(*texts, sha256="1", share=0.5) -> Tokenised:
        table = Chunk(0, 0, list(texts), Tally(), False).as_table()
        places = {"tokenizer": tmp_path / "tokenizer.json", "parts": tmp_path / "parts"}
        made = tokenise_chunk(table, **places, tokenizer_sha256=sha256, validation_fraction=share, token_bytes=2)
        return Tokenised.of_row({key: value for key, [value] in made.items()})

    return run


def test_a_part_is_found_by_texts_tokenizer_and_share(tokenise):
    first = tokenise("a boat", "the sea")
    assert not first.found
    again = tokenise("a boat", "the sea")
    assert again == first._replace(found=True)
    for other in (tokenise("a boat"), tokenise("a boatthe", " sea"), tokenise("the sea", "a boat")):
        assert not other.found
    assert not tokenise("a boat", "the sea", sha256="2").found
    assert not tokenise("a boat", "the sea", share=0.4).found


def test_a_damaged_part_is_made_again(tokenise, tmp_path):
    first = tokenise("a boat", "the sea")
    [tokens] = tmp_path.glob("parts/*/*.tokens")
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-1])
    assert tokenise("a boat", "the sea") == first
    assert tokens.read_bytes() == content
    tokens.unlink()
    assert tokenise("a boat", "the sea") == first
    assert tokens.read_bytes() == content
