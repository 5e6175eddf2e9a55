"""Conversion of vocabularies in tiktoken's format to byte-level BPE of the tokenizers library.

A line of such a vocabulary is a token's bytes in base64, a space and the token's rank, which is its id. tiktoken splits
a text into pieces by a pattern. If a piece is not a token, tiktoken repeatedly merges the two neighbours whose bytes
together have the lowest rank, the leftmost of equals. The library merges pairs by the rank of the pair, so each way to
cut a token into two tokens becomes a pair, in the order of the tokens' ranks.

The different ranks of a token's pairs make no difference: merges among the token's bytes do not depend on the text
around them, as long as none joins them to bytes outside, so these bytes are in the same two parts wherever they can
form the token. Both libraries therefore encode every text alike; tests compare them.
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
"""Patterns that split text into pieces, by vocabulary; Llama 3 uses that of cl100k."""


def _byte_letters() -> dict[int, int]:
    # GPT-2 writes the printable characters of Latin-1 as themselves and all other bytes as letters from U+0100 on.
    printable_bytes = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    other_bytes = [byte for byte in range(256) if byte not in printable_bytes]
    return {byte: byte for byte in printable_bytes} | {byte: 0x100 + i for i, byte in enumerate(other_bytes)}


LETTER_OF_BYTE = _byte_letters()
"""Code point of the printable character that byte-level models write for each byte (GPT-2's table)."""
BYTE_OF_LETTER = {chr(letter): byte for byte, letter in LETTER_OF_BYTE.items()}

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})")


def is_tiktoken(content: bytes) -> bool:
    """Return whether a file's first line is in tiktoken's format."""
    return _LINE.fullmatch(content.lstrip().partition(b"\n")[0].rstrip()) is not None


def from_tiktoken(content: bytes, pattern: str, subject: str) -> Tokenizer:
    """Convert a vocabulary in tiktoken's format to a tokenizer of the tokenizers library that gives the same ids.

    `pattern` is a name of PATTERNS, or a regular expression in the syntax of Oniguruma, in which `$` also matches at
    the end of a line; text that it does not match becomes separate pieces. `<|endoftext|>` becomes a special token, if
    need be with the next id after the ranks. A malformed vocabulary or expression is a DataError.
    """
    ranks = _parse_ranks(content, subject)
    try:
        split = Regex(PATTERNS.get(pattern, pattern))
    # The library raises no subclass of Exception, so Exception itself is caught.
    except Exception as e:
        reason = f"data.tokenizer_pattern is no regular expression: {str(e).splitlines()[0]}"
        raise DataError(subject, reason, f"correct it, or name one of {', '.join(PATTERNS)}") from e
    token_texts = {token: token.decode("latin-1").translate(LETTER_OF_BYTE) for token in ranks}
    merges = [
        (token_texts[token[:cut]], token_texts[token[cut:]])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {token_texts[token]: rank for token, rank in ranks.items()}
    # With `ignore_merges` the library first looks up a whole piece, as tiktoken does.
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


def _parse_ranks(content: bytes, subject: str) -> dict[bytes, int]:
    """Return the ranks of tokens by their bytes, in order; a malformed or incomplete vocabulary is a DataError."""
    fix = "use a whole file as tiktoken reads it: lines of base64, a space and a rank"
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip())
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if match is None or not token:
            raise DataError(subject, f"line {number} is not of tiktoken's format", fix)
        if token in ranks:
            raise DataError(subject, f"line {number} repeats an earlier token", fix)
        ranks[token] = int(match[2])
    missing_bytes = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing_bytes:
        reason = f"it has no token for {len(missing_bytes)} of the 256 bytes, the first is {missing_bytes[0]}"
        raise DataError(subject, reason, fix)
    # The lines of a file may be in any order, but merges are made in the order of ranks.
    ordered_ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ordered_ranks.values()) != list(range(len(ordered_ranks))):
        raise DataError(
            subject, f"its {len(ordered_ranks)} ranks are not 0 to {len(ordered_ranks) - 1}, each once", fix
        )
    return ordered_ranks
