"""A tokenizer trained on a sample of the sources, in the proportions that training reads.

    budgets      domains by the mixture of the first phase that reads them, never more than they have; then a domain's
                 files by size. Sizes are those of the stored files; what is compressed counts as three times that.
    files        evenly spread, as many as leave each one MIN_FILE characters to give and hold four times the budget;
                 all of them, where these are not enough
    documents    those of the smallest hashes among the first REACH budgets of a file; of other hashes than those that
                 hold documents out, or these would be what the tokenizer knows best

So the sample depends on names, sizes and texts alone, a file up to REACH times its budget is sampled from beginning to
end, and neither memory nor reading grows with the corpus.

Both models spell text in bytes, all 256 of which they have, so that
any text comes back as it was; the result depends on the files and settings alone.
"""

import hashlib
import heapq
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.order.mixture import apportion, phase_shares
from mhmoe_ray.data.order.order import OrderedDomain
from mhmoe_ray.data.sources import Document, RawFile, Reading
from mhmoe_ray.data.tokenizer.vocabulary import END_OF_TEXT
from mhmoe_ray.spec import DataSpec

MIN_FILE = 50_000
REACH = 64


def sample_texts(files: list[RawFile], spec: DataSpec) -> Iterator[str]:
    """About `spec.tokenizer_train_mb` million characters, documents of one file after another."""
    for file, characters in file_budgets(files, spec):
        yield from _sample(file, spec, characters)


def file_budgets(files: list[RawFile], spec: DataSpec) -> list[tuple[RawFile, int]]:
    """The files to read and how many characters to take of each."""
    by_domain: dict[str, list[RawFile]] = defaultdict(list)
    for file in files:
        by_domain[file.domain].append(file)
    budgets = domain_budgets({name: sum(map(_size, own)) for name, own in by_domain.items()}, spec)
    result = []
    for name, own in by_domain.items():
        count, chosen = max(1, budgets[name] // MIN_FILE), own
        while count < len(own):
            chosen = [own[i * len(own) // count] for i in range(count)]
            if sum(map(_size, chosen)) >= 4 * budgets[name]:
                break
            count, chosen = 2 * count, own
        sizes = [_size(file) for file in chosen]
        total = min(budgets[name], sum(sizes))
        parts = apportion(total, sizes, sizes, 0.5) if total else []
        result += [(file, part) for file, part in zip(chosen, parts, strict=bool(parts)) if part]
    return result


def domain_budgets(sizes: dict[str, int], spec: DataSpec) -> dict[str, int]:
    """Characters to take of each domain.

    Args:
        sizes: characters that there are of each.
        spec: says how they are mixed; a domain that its first phase does not read counts as in the first one that does.
    """
    names = sorted(sizes)
    domains = [OrderedDomain(name, source_of(name), 0) for name in names]
    weights = [0.0] * len(names)
    for mixes in spec.mixes.values():
        shares = phase_shares(mixes, domains, [max(1, sizes[name]) for name in names], flat=True)
        weights = [before or now for before, now in zip(weights, shares, strict=True)]
    limits = [sizes[name] if weight else 0 for name, weight in zip(names, weights, strict=True)]
    total = min(int(spec.train_mb * 1e6), sum(limits))
    return dict(zip(names, apportion(total, weights, limits, 0.5), strict=True))


def _size(file: RawFile) -> int:
    return file.size * file.inflation


def _sample(file: RawFile, spec: DataSpec, characters: int) -> Iterator[str]:
    kept: list[tuple[int, int, str]] = []  # a heap: the largest hash first
    size = passed = 0
    for item in Reading(file, spec):
        if not isinstance(item, Document):
            continue  # counted where it matters, when the file is tokenised
        digest = hashlib.blake2b(item.text.encode(), digest_size=8, person=b"tokenizer").digest()
        heapq.heappush(kept, (-int.from_bytes(digest, "big"), item.line, item.text))
        size += len(item.text)
        while size - len(kept[0][2]) >= characters:
            size -= len(heapq.heappop(kept)[2])
        passed += len(item.text)
        if passed >= REACH * characters:
            break
    for _, _, text in sorted(kept, reverse=True):
        yield text[:characters]
        characters -= len(text)


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
