"""Training of a tokenizer on a sample of the sources, in the proportions in which the model's training reads them.

    budgets      characters to sample. A domain's budget follows the mixture of the first phase that reads the domain,
                 and is at most the domain's size. The budgets of its files are in proportion to their stored sizes; a
                 compressed file counts as three times its size.
    files        a selection spread evenly over the domain: one file per MIN_FILE_CHARACTERS of the domain's budget.
                 While they have less than four times this budget of text, twice as many are selected.
    documents    those with the smallest hashes in the first part of a file, which is READ_FACTOR times as long as its
                 budget. The hash is not the one that selects held-out documents; otherwise the tokenizer would know
                 these best.

The sample depends on names, sizes and texts alone, and the result on files and settings. Neither memory nor reading
grows with the corpus. Both kinds of tokenizer, BPE and Unigram, have all 256 bytes, so that decoding restores any text
exactly.
"""

import hashlib
import heapq
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.order.mixture import apportion, phase_shares
from mhmoe_ray.data.order.order import OrderedDomain
from mhmoe_ray.data.sources import Document, FileReader, RawFile
from mhmoe_ray.data.tokenizer.vocabulary import END_OF_TEXT
from mhmoe_ray.spec import DataSpec

MIN_FILE_CHARACTERS = 50_000
READ_FACTOR = 64


def sample_texts(files: list[RawFile], spec: DataSpec) -> Iterator[str]:
    """Yield sampled texts: about `spec.train_mb` million characters, or all texts."""
    # Images are not decoded here: sources are read as if they had texts alone.
    text_sources = {name: source for name, source in spec.sources.items() if "text" in source.sample_columns}
    text_files = [file for file in files if source_of(file.domain) in text_sources]
    text_spec = spec
    if spec.has_images:
        readable_sources = {n: source.model_copy(update={"columns": ["text"]}) for n, source in text_sources.items()}
        text_spec = spec.model_copy(update={"sources": readable_sources})
    for file, characters in file_budgets(text_files, spec):
        yield from _sample_file(file, text_spec, characters)


def file_budgets(files: list[RawFile], spec: DataSpec) -> list[tuple[RawFile, int]]:
    """Return the files to read for training and the number of characters to sample of each."""
    text_size = partial(_text_size, spec=spec)
    by_domain: dict[str, list[RawFile]] = defaultdict(list)
    for file in files:
        by_domain[file.domain].append(file)
    budgets = domain_budgets(
        {name: sum(map(text_size, domain_files)) for name, domain_files in by_domain.items()}, spec
    )
    result = []
    for name, domain_files in by_domain.items():
        count, sampled_files = max(1, budgets[name] // MIN_FILE_CHARACTERS), domain_files
        while count < len(domain_files):
            sampled_files = [domain_files[i * len(domain_files) // count] for i in range(count)]
            if sum(map(text_size, sampled_files)) >= 4 * budgets[name]:
                break
            count, sampled_files = 2 * count, domain_files
        sizes = [text_size(file) for file in sampled_files]
        total = min(budgets[name], sum(sizes))
        parts = apportion(total, sizes, sizes, 0.5) if total else []
        result += [(file, part) for file, part in zip(sampled_files, parts, strict=bool(parts)) if part]
    return result


def domain_budgets(sizes: dict[str, int], spec: DataSpec) -> dict[str, int]:
    """Return the number of characters to sample of each domain, given the `sizes` of the domains in characters.

    Budgets add up to at most `spec.train_mb` million characters. A domain's share is that of the first phase of the
    mixture's schedule that reads it.
    """
    names = sorted(sizes)
    domains = [OrderedDomain(name, source_of(name), 0) for name in names]
    weights = [0.0] * len(names)
    sources = {domain.source for domain in domains}
    for phase_mixes in spec.mixes.values():
        # Sources of images have no text, and a phase may read nothing else.
        mixes = {name: mix for name, mix in phase_mixes.items() if name in sources}
        if not any(mix.weight for mix in mixes.values()):
            continue
        shares = phase_shares(mixes, domains, [max(1, sizes[name]) for name in names], apply_temperature=True)
        weights = [current_weight or share for current_weight, share in zip(weights, shares, strict=True)]
    limits = [sizes[name] if weight else 0 for name, weight in zip(names, weights, strict=True)]
    total = min(int(spec.train_mb * 1e6), sum(limits))
    return dict(zip(names, apportion(total, weights, limits, 0.5), strict=True))


# Assumed number of stored bytes of an image and its caption, per character of the caption. Photos from the web have
# some hundreds of bytes, and small drawings fewer than ten. If the number is too low, a file seems to have more text
# than it has, and too few files are read.
_PAIR_BYTES_PER_CHARACTER = 20


def _text_size(file: RawFile, spec: DataSpec) -> int:
    has_images = "image" in spec.sources[source_of(file.domain)].sample_columns
    if file.format == "webdataset" or (has_images and file.format != "coco"):
        return file.size // _PAIR_BYTES_PER_CHARACTER
    return file.size * file.inflation


def _sample_file(file: RawFile, spec: DataSpec, characters: int) -> Iterator[str]:
    """Yield the documents with the smallest hashes in a file's first part, the last one cut to `characters` in all."""
    # Hashes are negative in the heap, so that the document with the largest hash is removed first.
    heap: list[tuple[int, int, str]] = []
    heap_characters = read_characters = 0
    for item in FileReader(file, spec):
        if not isinstance(item, Document):
            # Unreadable items are counted later, when the file is tokenised. A download may be damaged now alone, which
            # would give another tokenizer.
            if item.reason.loses_lines and not spec.max_bad_files:
                raise item.damage_error(1, 0)
            continue
        text = item.model_text
        digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"tokenizer").digest()
        heapq.heappush(heap, (-int.from_bytes(digest, "big"), item.line, text))
        heap_characters += len(text)
        while heap_characters - len(heap[0][2]) >= characters:
            heap_characters -= len(heapq.heappop(heap)[2])
        read_characters += len(text)
        if read_characters >= READ_FACTOR * characters:
            break
    for _, _, text in sorted(heap, reverse=True):
        yield text[:characters]
        characters -= len(text)


MAX_PIECE_BYTES = 32
"""Largest number of bytes in a Unigram piece; a letter has up to 4 bytes."""
MAX_WORD_BYTES = 1000
"""Bytes that are processed together: text without a break (a DNA sequence, Base64) is cut, since time grows with the
square of a word's length."""
# SentencePiece writes a space as this character, which is not in the byte-level alphabet.
_SPACE = "\u2581"
_THREADS = 16
"""Threads of SentencePiece: it adds up the counts of the threads, so another number would change the last digits of
scores."""


def train_tokenizer(files: Iterable[RawFile], spec: DataSpec, vocab_size: int) -> Tokenizer:
    """Train a tokenizer of the kind `spec.tokenizer_model` on a sample of the files.

    It has at most `vocab_size` entries, but at least 257: all bytes and `<|endoftext|>`.
    """
    train = train_unigram if spec.tokenizer_model == "unigram" else train_bpe
    return train(sample_texts(list(files), spec), vocab_size)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level byte-pair encoding (BPE) on texts; `<|endoftext|>` has id 0."""
    tokenizer = _byte_level_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    byte_level = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, pre_tokenizers.FixedLength(MAX_WORD_BYTES)])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = byte_level
    return tokenizer


def train_unigram(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level Unigram language model (Kudo 2018, arXiv 1804.10959); `<|endoftext|>` has the last id."""
    # SentencePiece trains the model, because the scores of the tokenizers library differ from run to run: that library
    # sums in the order of a hash table. Here the tokenizers library only splits the texts into words.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Sequence([byte_level, pre_tokenizers.FixedLength(MAX_WORD_BYTES)])
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in split.pre_tokenize_str(text))
    missing_letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()).difference(*words))
    # One entry is left for the special token, which is added after the training.
    piece_count = max(vocab_size - 1, 256) - len(missing_letters)
    pieces = _unigram_pieces(words, piece_count) if words else []
    lowest_score = min((score for _, score in pieces), default=0.0)
    tokenizer = _byte_level_tokenizer(
        models.Unigram([*pieces, *((letter, lowest_score - 1) for letter in missing_letters)])
    )
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _unigram_pieces(words: Counter[str], piece_count: int) -> list[tuple[str, float]]:
    """Return at most `piece_count` pieces of a Unigram model, with all letters, and their log probabilities."""
    # Serving does not need SentencePiece, so it is imported only here.
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_training_lines(words),
        input_format="tsv",
        model_writer=model,
        model_type="unigram",
        # Two more entries are needed: SentencePiece always has an unknown token, and the space is one of its letters.
        vocab_size=piece_count + 2,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        character_coverage=1.0,
        max_sentencepiece_length=MAX_PIECE_BYTES,
        max_sentence_length=1 << 30,
        num_threads=_THREADS,
        minloglevel=2,
        # The letters stand for bytes, so rules for characters must not apply.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_number=False,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(1, processor.get_piece_size())]
    return [(piece, score) for piece, score in pieces if piece != _SPACE]


def _training_lines(words: Counter[str]) -> Iterator[str]:
    # SentencePiece makes a piece only of text that occurs before two different characters. Each word therefore stands
    # once before a space, so that every word that occurs twice can become a piece. SentencePiece splits the word off
    # the space again.
    for word, count in sorted(words.items()):
        yield f"{word}{_SPACE}\t1"
        if count > 1:
            yield f"{word}\t{count - 1}"


def _byte_level_tokenizer(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
