import pytest

from mhmoe_ray.data.tokenizer import Boundaries, boundaries, boundary_texts, find_boundaries

from .words import make_word_tokenizer


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        (("a", "<|endoftext|>"), ("<|endoftext|>", "<|endoftext|>")),
        (("a", "<s>", "</s>"), ("<s>", "</s>")),
        (("a", "</s>", "<s>"), ("<s>", "</s>")),
    ],
)
def test_boundary_texts_name_the_end_token(tokens, texts):
    assert boundary_texts(make_word_tokenizer(*tokens)) == texts


def test_boundaries_are_end_of_text_or_a_pair_of_tokens():
    assert boundaries(make_word_tokenizer("a", "<|endoftext|>")) == Boundaries(1, frozenset([1]))
    assert boundaries(make_word_tokenizer("a", "<s>", "</s>")) == Boundaries(1, frozenset([1, 2]))
    assert boundaries(make_word_tokenizer("<s>", "</s>", "<|endoftext|>")) == Boundaries(2, frozenset([2]))
    assert find_boundaries(make_word_tokenizer("a", "<s>")) is None
    with pytest.raises(ValueError, match="in the tokenizer"):
        boundaries(make_word_tokenizer("a", "<s>"))
