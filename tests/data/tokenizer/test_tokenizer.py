import pytest
from tokenizers import Tokenizer, models

from mhmoe_ray.data.tokenizer import Boundaries, boundaries, load_tokenizer
from mhmoe_ray.errors import DataError


def words(*tokens) -> Tokenizer:
    return Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))


def test_a_document_has_edges_of_either_kind():
    assert boundaries(words("a", "<|endoftext|>")) == Boundaries(1, frozenset([1]))
    assert boundaries(words("a", "<s>", "</s>")) == Boundaries(1, frozenset([1, 2]))
    assert boundaries(words("<s>", "</s>", "<|endoftext|>")) == Boundaries(2, frozenset([2]))
    assert boundaries(words("a", "<s>")) is None


def test_a_tokenizer_of_neither_kind_is_refused_with_both_named(tmp_path):
    words("a", "</s>").save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"neither the token <\|endoftext\|> nor the two tokens <s> and </s>"):
        load_tokenizer(tmp_path / "t.json", 10)
    words("a", "<s>", "</s>").save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json", 3).get_vocab_size() == 3
    with pytest.raises(DataError, match="it has 3 entries"):
        load_tokenizer(tmp_path / "t.json", 2)
