"""Tokenizers: a given tokenizer.json or file in tiktoken's format, or one trained on the sources.

A prepared folder and a run store any tokenizer as tokenizer.json. Their manifests and those of checkpoints have its
SHA-256; a file with another one is refused.

A start token precedes each document, in training and in prompts. It means "a new document begins" and, in a text being
generated, "this document is over". No other special token is ever added. The first row that fits applies:

    | a tokenizer with               | start token   | tokens that end a generated text             |
    | ------------------------------ | ------------- | -------------------------------------------- |
    | a post-processor that adds one | that token    | that token; <|endoftext|>, </s> if present   |
    | <|endoftext|>                  | <|endoftext|> | <|endoftext|>                                |
    | <s> and </s>                   | <s>           | <s>, </s>                                    |

An imported model may have been trained without a start token; its checkpoint manifest then has `adds_start: false`, and
prompts begin without it. If a document contains the letters "<|endoftext|>", these letters are encoded, never the
token. The same holds for the messages of a conversation, but not for its chat template. A prompt may name special
tokens, so that it can contain several documents.

    vocabulary.py   the table above, the number of tokens, and the number of bytes of each
    encoder.py      the encoder of documents, by the tokenizers library, or by tiktoken if both give the same ids
    load.py         reads and checks a given tokenizer
    tiktoken.py     converts tiktoken's format to the tokenizers library, exactly
    train.py        trains a byte-level BPE or Unigram model, and samples its training text
"""

from mhmoe_ray.data.tokenizer.encoder import DocumentEncoder, document_encoder
from mhmoe_ray.data.tokenizer.load import load_tokenizer, read_given_tokenizer, store_given_tokenizer
from mhmoe_ray.data.tokenizer.train import train_tokenizer
from mhmoe_ray.data.tokenizer.vocabulary import (
    BEGIN_TOKEN,
    END_OF_TEXT,
    END_TOKEN,
    UNKNOWN_WIDTH,
    Boundaries,
    added_start_token,
    boundaries,
    boundary_texts,
    chat_texts,
    find_boundaries,
    token_count,
    token_widths,
    unknown_token,
)

__all__ = [
    "BEGIN_TOKEN",
    "END_OF_TEXT",
    "END_TOKEN",
    "UNKNOWN_WIDTH",
    "Boundaries",
    "DocumentEncoder",
    "added_start_token",
    "boundaries",
    "boundary_texts",
    "chat_texts",
    "document_encoder",
    "find_boundaries",
    "load_tokenizer",
    "read_given_tokenizer",
    "store_given_tokenizer",
    "token_count",
    "token_widths",
    "train_tokenizer",
    "unknown_token",
]
