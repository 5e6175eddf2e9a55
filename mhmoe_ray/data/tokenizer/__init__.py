"""Text to token ids: a given tokenizer.json or file in tiktoken's format, or a tokenizer trained on the sources.

A prepared folder and a run hold it as tokenizer.json, whatever it was made from; their manifests and those of
checkpoints hold its SHA-256, and a file with another one is refused wherever the two meet.

Documents. Each one is preceded by a start token, in training and in prompts alike, so that the token says "a new
document begins" and, for a text being generated, "this one is over". No other special token is ever put in.

    | a tokenizer with | start         | a text being generated ends at |
    | ---------------- | ------------- | ------------------------------ |
    | <|endoftext|>    | <|endoftext|> | <|endoftext|>                  |
    | <s> and </s>     | <s>           | <s>, </s>                      |

Special tokens. A document is text from its first character to its last: one that holds the letters "<|endoftext|>" is
encoded as these letters, never as the token. A prompt is not: it may name special tokens, to hold several documents.

    vocabulary.py   the table above, how many tokens there are, and how many bytes each stands for
    encoder.py      the encoder of documents: the library's, or tiktoken's where both give the same
    load.py         a given tokenizer, checked
    tiktoken.py     tiktoken's format to the tokenizers library, exactly
    train.py        a byte-level BPE or Unigram model of its own, and the text that it is trained on
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
