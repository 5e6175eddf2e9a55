"""Tokenizers: a given tokenizer.json or file in tiktoken's format, or one trained on the sources.

A prepared folder and a run hold the tokenizer as tokenizer.json, whatever it was made from. Their manifests and those
of checkpoints hold its SHA-256; where two of them meet, a file with another SHA-256 is refused.

Documents. Each document is preceded by a start token, in training and in prompts alike. The token means "a new document
begins" and, in a text being generated, "this document is over". No other special token is ever added.

    | a tokenizer with | start         | a text being generated ends at |
    | ---------------- | ------------- | ------------------------------ |
    | <|endoftext|>    | <|endoftext|> | <|endoftext|>                  |
    | <s> and </s>     | <s>           | <s>, </s>                      |

Special tokens. A document is plain text from its first character to its last: if it holds the letters "<|endoftext|>",
these letters are encoded, never the token. A prompt is different: it may name special tokens, so that it can hold
several documents.

    vocabulary.py   the table above, the number of tokens, and the number of bytes that each stands for
    encoder.py      the encoder of documents: the library's, or tiktoken's where both give the same ids
    load.py         reads and checks a given tokenizer
    tiktoken.py     converts tiktoken's format to the tokenizers library, exactly
    train.py        trains a byte-level BPE or Unigram model, and samples the text to train it on
"""

from mhmoe_ray.data.tokenizer.encoder import DocumentEncoder, document_encoder
from mhmoe_ray.data.tokenizer.load import load_tokenizer, read_given, store_given
from mhmoe_ray.data.tokenizer.train import train_tokenizer
from mhmoe_ray.data.tokenizer.vocabulary import (
    BEGIN,
    END,
    END_OF_TEXT,
    UNKNOWN,
    Boundaries,
    boundaries,
    find_boundaries,
    token_count,
    token_widths,
    unknown_token,
)

__all__ = [
    "BEGIN",
    "END",
    "END_OF_TEXT",
    "UNKNOWN",
    "Boundaries",
    "DocumentEncoder",
    "boundaries",
    "document_encoder",
    "find_boundaries",
    "load_tokenizer",
    "read_given",
    "store_given",
    "token_count",
    "token_widths",
    "train_tokenizer",
    "unknown_token",
]
