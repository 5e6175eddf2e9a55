import pytest

from mhmoe_ray.data.tokenizer import Boundaries, boundaries, find_boundaries

from .words import words


def test_a_document_has_edges_of_either_kind():
    assert boundaries(words("a", "<|endoftext|>")) == Boundaries(1, frozenset([1]))
    assert boundaries(words("a", "<s>", "</s>")) == Boundaries(1, frozenset([1, 2]))
    assert boundaries(words("<s>", "</s>", "<|endoftext|>")) == Boundaries(2, frozenset([2]))
    assert find_boundaries(words("a", "<s>")) is None
    with pytest.raises(ValueError, match="in the tokenizer"):
        boundaries(words("a", "<s>"))
