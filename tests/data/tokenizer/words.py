"""Tokenizers of whole words, the smallest there are."""

from tokenizers import Tokenizer, models


def words(*tokens) -> Tokenizer:
    return Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
