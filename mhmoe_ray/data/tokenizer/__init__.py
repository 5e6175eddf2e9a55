"""The tokenizer: a given tokenizer.json, or a byte-level BPE trained on the sources.

Rule of documents: each one is preceded by a start token, in training and in prompts alike, so that the token says "a
new document begins" and, for a text being generated, "this one is over".

    | a tokenizer with | start         | a text being generated ends at |
    | ---------------- | ------------- | ------------------------------ |
    | <|endoftext|>    | <|endoftext|> | <|endoftext|>                  |
    | <s> and </s>     | <s>           | <s>, </s>                      |
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mhmoe_ray.data.sources import Document, RawFile, Reading
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec

END_OF_TEXT = "<|endoftext|>"
BEGIN, END = "<s>", "</s>"


class Boundaries(NamedTuple):
    """Token ids at the edges of a document."""

    start: int
    """Precedes each one."""
    ends: frozenset[int]
    """Any of these says that it is over."""


def boundaries(tokenizer: Tokenizer) -> Boundaries | None:
    """By the table above; None for a tokenizer of neither kind."""
    both, begin, end = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, BEGIN, END))
    if both is not None:
        return Boundaries(both, frozenset([both]))
    if begin is not None and end is not None:
        return Boundaries(begin, frozenset([begin, end]))
    return None


def train_tokenizer(files: Iterable[RawFile], spec: DataSpec, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries, from text of `tokenizer_train_mb`, an even part a domain."""
    by_domain: dict[str, list[RawFile]] = defaultdict(list)
    for file in files:
        by_domain[file.domain].append(file)
    each = int(spec.tokenizer_train_mb * 1e6 / len(by_domain))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((t for part in by_domain.values() for t in _texts(part, spec, each)), trainer)
    return tokenizer


def _texts(files: list[RawFile], spec: DataSpec, characters: int) -> Iterable[str]:
    for file in files:
        for item in Reading(file, spec):
            if not isinstance(item, Document):
                continue  # counted where it matters, when the file is tokenised
            yield item.text[:characters]
            characters -= len(item.text)
            if characters <= 0:
                return


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """A tokenizer.json that fits a model of `vocab_size` rows.

    Raises:
        DataError: it cannot be read, has more entries than the model, or no tokens for the edges of a document.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise DataError(
            f"tokenizer {path}", str(e).splitlines()[0], "use a tokenizer.json of the tokenizers library"
        ) from e
    size = tokenizer.get_vocab_size()
    if size > vocab_size:
        fix = f"use one of at most model.vocab_size ({vocab_size}), or a model with more"
        raise DataError(f"tokenizer {path}", f"it has {size} entries", fix)
    if boundaries(tokenizer) is None:
        why = f"it has neither the token {END_OF_TEXT} nor the two tokens {BEGIN} and {END}"
        raise DataError(f"tokenizer {path}", why, "add one or the other as special tokens")
    return tokenizer
