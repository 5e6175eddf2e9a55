"""Conversion of vocabularies in tiktoken's format to byte-level BPE of the tokenizers library.

A line is a token's bytes in base64, a space and its rank, which is its id. tiktoken first looks up a whole piece of
text. If that is no token, it merges two neighbours again and again: those whose bytes together have the lowest rank,
the leftmost of equals. The library merges pairs by the rank of the pair, so each way to cut a token in two becomes a
pair, in the order of the tokens' ranks. Several pairs of one token thus have different ranks, not equal ones; but no
text ever offers two of them at once: what happens within a stretch of bytes that no merge has crossed depends on these
bytes alone, so the stretch is in the same two parts wherever it occurs. The two encode every text alike; tests compare
them.
"""

import base64
import binascii
import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from mhmoe_ray.data.tokenizer.vocabulary import END_OF_TEXT
from mhmoe_ray.errors import DataError

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": _CL100K,
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": _CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),
}
"""Patterns that split text into pieces before merging, by the names of vocabularies; Llama 3 splits as cl100k does."""


def _byte_letters() -> dict[int, int]:
    themselves = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in themselves]
    return {byte: byte for byte in themselves} | {byte: 0x100 + i for i, byte in enumerate(others)}


LETTERS = _byte_letters()
"""Code point of the printable character by which byte-level models write each byte (GPT-2's table)."""
BYTE_OF_LETTER = {chr(letter): byte for byte, letter in LETTERS.items()}

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})")


def is_tiktoken(content: bytes) -> bool:
    """Return whether the first line of a file's content is in tiktoken's format."""
    return _LINE.fullmatch(content.lstrip().partition(b"\n")[0].rstrip()) is not None


def from_tiktoken(content: bytes, pattern: str, what: str) -> Tokenizer:
    """Return a tokenizer of the tokenizers library that encodes as tiktoken does.

    `<|endoftext|>` becomes a special token, with the next id after the ranks unless it is among them.

    Args:
        content: the content of the file.
        pattern: a name of PATTERNS, or a regular expression in the syntax of Oniguruma, where `$` is also the end of a
            line. Text that it does not match is kept as pieces of its own.
        what: the name of the file in error messages.

    Raises:
        DataError: the content is not in the format, or the expression is wrong.
    """
    ranks = _ranks(content, what)
    try:
        split = Regex(PATTERNS.get(pattern, pattern))
    except Exception as e:  # the library raises bare Exception
        why = f"data.tokenizer_pattern is no regular expression: {str(e).splitlines()[0]}"
        raise DataError(what, why, f"correct it, or name one of {', '.join(PATTERNS)}") from e
    text = {token: token.decode("latin-1").translate(LETTERS) for token in ranks}
    merges = [
        (text[token[:at]], text[token[at:]])
        for token in ranks
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    ]
    vocab = {text[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _ranks(content: bytes, what: str) -> dict[bytes, int]:
    """Return the ranks of tokens by their bytes, in the order of ranks.

    Raises:
        DataError: a line is not in the format, a token repeats, a byte has no token, or the ranks are not 0 to n - 1.
    """
    fix = "use a whole file as tiktoken reads it: lines of base64, a space and a rank"
    found: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip())
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if match is None or not token:
            raise DataError(what, f"line {number} is not of tiktoken's format", fix)
        if token in found:
            raise DataError(what, f"line {number} has a token that was there before", fix)
        found[token] = int(match[2])
    missing = [byte for byte in range(256) if bytes([byte]) not in found]
    if missing:
        why = f"it has no token for {len(missing)} of the 256 bytes, the first is {missing[0]}"
        raise DataError(what, why, fix)
    ordered = dict(sorted(found.items(), key=lambda item: item[1]))
    if list(ordered.values()) != list(range(len(ordered))):
        raise DataError(what, f"its {len(ordered)} ranks are not 0 to {len(ordered) - 1}, each once", fix)
    return ordered
