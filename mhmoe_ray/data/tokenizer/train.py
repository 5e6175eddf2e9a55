"""A tokenizer trained on a sample of the sources. Both models spell text in bytes, all 256 of which they have, so that
any text comes back as it was; the result depends on the files and settings alone."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mhmoe_ray.data.sources import RawFile
from mhmoe_ray.data.tokenizer.edges import END_OF_TEXT
from mhmoe_ray.data.tokenizer.sample import sample_texts
from mhmoe_ray.spec import DataSpec

MAX_PIECE = 32
"""Bytes of a Unigram piece; a letter has up to 4."""
MAX_WORD = 1000
"""Bytes that are looked at together. Text without a space or another break (a sequence of DNA, Base64) is cut: time
goes with the square of a word's length."""
_SPACE = "\u2581"  # SentencePiece's, which no letter of the byte-level alphabet is
_THREADS = 16
"""SentencePiece adds up each thread's share of the counts, so that another number gives other last digits. Any machine
runs that many."""


def train_tokenizer(files: Iterable[RawFile], spec: DataSpec, vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries, but at least 257, of the kind `spec.tokenizer_model`."""
    train = train_unigram if spec.tokenizer_model == "unigram" else train_bpe
    return train(sample_texts(list(files), spec), vocab_size)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level byte-pair encoding. `<|endoftext|>` has id 0."""
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    whole = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([whole, pre_tokenizers.FixedLength(MAX_WORD)])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = whole
    return tokenizer


def train_unigram(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level Unigram language model (Kudo 2018, arXiv 1804.10959). `<|endoftext|>` has the last id.

    SentencePiece trains it: the tokenizers library adds up in the order of a hash table, so that its scores are not the
    same twice.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Sequence([byte_level, pre_tokenizers.FixedLength(MAX_WORD)])
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in split.pre_tokenize_str(text))
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()).difference(*words))
    room = max(vocab_size - 1, 256) - len(missing)  # the special token is none of the model's
    pieces = _unigram_pieces(words, room) if words else []
    worst = min((score for _, score in pieces), default=0.0)
    tokenizer = _byte_level(models.Unigram([*pieces, *((letter, worst - 1) for letter in missing)]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _unigram_pieces(words: Counter[str], size: int) -> list[tuple[str, float]]:
    """At most `size` pieces and their log probabilities, each letter of the words among them."""
    import sentencepiece  # here, since serving does without it

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(words),
        input_format="tsv",
        model_writer=model,
        model_type="unigram",
        vocab_size=size + 2,  # it insists on an unknown token, and SPACE is one of its letters
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        character_coverage=1.0,
        max_sentencepiece_length=MAX_PIECE,
        max_sentence_length=1 << 30,
        num_threads=_THREADS,
        minloglevel=2,
        # The letters stand for bytes: what they are as characters must not matter.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_number=False,
    )
    made = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(made.id_to_piece(i), made.get_score(i)) for i in range(1, made.get_piece_size())]
    return [(piece, score) for piece, score in pieces if piece != _SPACE]


def _lines(words: Counter[str]) -> Iterator[str]:
    """Each word and its count, once by itself and once before a space, at which SentencePiece splits it off again: only
    what stands before two different characters can become a piece, and so each word that occurs twice can."""
    for word, count in sorted(words.items()):
        yield f"{word}{_SPACE}\t1"
        if count > 1:
            yield f"{word}\t{count - 1}"


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
