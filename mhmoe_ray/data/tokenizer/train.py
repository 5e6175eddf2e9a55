"""Training of a tokenizer on a sample of the sources, in the proportions that training reads.

    budgets      characters to sample. Domains: by the mixture of the first phase that reads them, never more than they
                 have. Files of a domain: by size. Sizes are those of the stored files; a compressed file counts as
                 three times its size.
    files        evenly spread over the domain: as many as give each a budget of MIN_FILE characters and together hold
                 four times the budget; all files, where these are not enough
    documents    those with the smallest hashes among the first REACH budgets of a file. The hash is another one than
                 that which holds out documents; otherwise the tokenizer would know held-out documents best.

So the sample depends on names, sizes and texts alone, a file up to REACH times its budget is sampled from beginning to
end, and neither memory nor reading grows with the corpus.

Both models spell text in bytes and have all 256 of them, so that any text is decoded exactly as it was. The result
depends on the files and settings alone.
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
    """Yield texts of about `spec.train_mb` million characters together, file after file."""
    for file, characters in file_budgets(files, spec):
        yield from _sample(file, spec, characters)


def file_budgets(files: list[RawFile], spec: DataSpec) -> list[tuple[RawFile, int]]:
    """Return the files to read, and how many characters to sample of each."""
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
    """Return the number of characters to sample of each domain.

    Args:
        sizes: number of characters of each domain.
        spec: the data section with the mixture; a domain that the first phase does not read gets its share of the first
            phase that does.
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
"""Largest number of bytes in a Unigram piece; a letter has up to 4."""
MAX_WORD = 1000
"""Largest number of bytes that are processed together: text without a space or another break (a DNA sequence, Base64)
is cut, since time grows with the square of a word's length."""
_SPACE = "\u2581"  # SentencePiece's, which no letter of the byte-level alphabet is
_THREADS = 16
"""Number of threads of SentencePiece, which any machine can run; it sums the counts of each thread, so another number
would change the last digits."""


def train_tokenizer(files: Iterable[RawFile], spec: DataSpec, vocab_size: int) -> Tokenizer:
    """Train a tokenizer of the kind `spec.tokenizer_model` with at most `vocab_size` entries, but at least 257."""
    train = train_unigram if spec.tokenizer_model == "unigram" else train_bpe
    return train(sample_texts(list(files), spec), vocab_size)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level byte-pair encoding; `<|endoftext|>` has id 0."""
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
    """Train a byte-level Unigram language model (Kudo 2018, arXiv 1804.10959); `<|endoftext|>` has the last id.

    SentencePiece trains it: the tokenizers library sums in the order of a hash table, so that its scores differ from
    run to run.
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
    """Return at most `size` pieces with their log probabilities; each letter of the words is among them."""
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
    """Yield lines of each word and its count for SentencePiece: once before a space, and the other times by itself.

    SentencePiece splits the word off the space again. Only text that occurs before two different characters can become
    a piece, so each word that occurs twice can.
    """
    for word, count in sorted(words.items()):
        yield f"{word}{_SPACE}\t1"
        if count > 1:
            yield f"{word}\t{count - 1}"


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
