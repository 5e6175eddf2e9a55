"""Tokenizers of a few whole words, and the tokenizer file of tiktoken whose words are the single bytes."""

import base64

from tokenizers import Tokenizer, models

BYTES = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


def make_word_tokenizer(*tokens) -> Tokenizer:
    """Return a tokenizer whose vocabulary is `tokens`, with ids in their order; the first one is the unknown token."""
    return Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
