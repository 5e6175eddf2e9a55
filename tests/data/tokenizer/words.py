"""The smallest possible tokenizers, with a token for each word."""

from tokenizers import Tokenizer, models


def make_word_tokenizer(*tokens) -> Tokenizer:
    return Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
