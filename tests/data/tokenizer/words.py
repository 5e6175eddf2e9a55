"""Tokenizers of a few whole words."""

from tokenizers import Tokenizer, models


def make_word_tokenizer(*tokens) -> Tokenizer:
    """Return a tokenizer whose vocabulary is `tokens`, with ids in their order; the first one is the unknown token."""
    return Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
