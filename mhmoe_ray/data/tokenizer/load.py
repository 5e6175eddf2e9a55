"""Loading and checks of tokenizers: those that a user gives, and those in runs and prepared folders."""

from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer.tiktoken import BYTE_OF_LETTER, from_tiktoken, is_tiktoken
from mhmoe_ray.data.tokenizer.vocabulary import (
    BEGIN_TOKEN,
    END_OF_TEXT,
    END_TOKEN,
    find_boundaries,
    token_count,
    unknown_token,
)
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import Location, replace_file


def load_tokenizer(path: Location, vocab_size: int) -> Tokenizer:
    """Load a tokenizer.json for a model of `vocab_size` tokens; an unreadable or unsuitable one is a DataError."""
    tokenizer = read_tokenizer(path)
    check_tokenizer(tokenizer, path, vocab_size)
    return tokenizer


def read_tokenizer(path: Location) -> Tokenizer:
    """Read a tokenizer.json without its stored truncation and padding; an unreadable file is a DataError."""
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    # The library raises no subclass of Exception, so Exception itself is caught.
    except Exception as e:
        fix = "use a tokenizer.json of the tokenizers library, or a file in tiktoken's format as data.tokenizer"
        raise DataError(f"tokenizer {path}", str(e).splitlines()[0], fix) from e
    # Other tools store the settings of their last batch, which would cut or pad every text here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_given_tokenizer(path: Location, pattern: str | None) -> Tokenizer:
    """Read `data.tokenizer`: a tokenizer.json, or a vocabulary in tiktoken's format, which needs the `pattern`.

    An unreadable file, and a missing or invalid pattern for a vocabulary, are a DataError.
    """
    subject = f"tokenizer {path}"
    try:
        content = path.read_bytes()
    except OSError as e:
        raise DataError(subject, e.strerror or str(e), "correct data.tokenizer") from e
    if not is_tiktoken(content):
        return read_tokenizer(path)
    if pattern is None:
        reason = "a file in tiktoken's format does not say how text is split before its ranks apply"
        raise DataError(subject, reason, "set data.tokenizer_pattern to gpt2, cl100k, o200k, qwen2 or an expression")
    return from_tiktoken(content, pattern, subject)


def store_given_tokenizer(spec: DataSpec, vocab_size: int, target: Location) -> None:
    """Write the tokenizer that a spec names as a tokenizer.json: a copy, or the conversion of a tiktoken vocabulary.

    A tokenizer that `load_tokenizer` would refuse, and a pattern beside a tokenizer.json, are a DataError.
    """
    path, pattern = spec.tokenizer, spec.tokenizer_pattern
    assert path is not None
    tokenizer = read_given_tokenizer(path, pattern)
    check_tokenizer(tokenizer, path, vocab_size)
    if is_tiktoken(content := path.read_bytes()):
        replace_file(target, tokenizer.to_str(pretty=True).encode())
        return
    if pattern is not None:
        reason = "a tokenizer.json has its own pattern, so data.tokenizer_pattern would be ignored"
        raise DataError(f"tokenizer {path}", reason, "remove that key")
    replace_file(target, content)


def check_tokenizer(tokenizer: Tokenizer, path: Location, vocab_size: int) -> None:
    """Check that a tokenizer fits a model, and that its boundary tokens only start and end documents.

    More tokens than the model has, no boundary tokens, or one that is also the unknown token are a DataError.
    """
    size = token_count(tokenizer)
    if size > vocab_size:
        fix = f"use one of at most model.vocab_size ({vocab_size}), or a model with more"
        raise DataError(f"tokenizer {path}", f"it has {size} entries", fix)
    boundary_tokens = find_boundaries(tokenizer)
    if boundary_tokens is None:
        reason = (
            f"it has neither the token {END_OF_TEXT} nor the two tokens {BEGIN_TOKEN} and {END_TOKEN}, and its "
            "post-processor adds no start token"
        )
        raise DataError(f"tokenizer {path}", reason, "add one or the other as special tokens")
    # If a model has all 256 bytes, it never needs its unknown token, so this token may also be a boundary token.
    if unknown_token(tokenizer) in boundary_tokens.ends | {boundary_tokens.start} and not _knows_all_bytes(tokenizer):
        reason = "its unknown token is also a boundary token of documents"
        raise DataError(f"tokenizer {path}", reason, "give it a separate unknown token")


def _knows_all_bytes(tokenizer: Tokenizer) -> bool:
    return tokenizer.get_vocab().keys() >= BYTE_OF_LETTER.keys()
