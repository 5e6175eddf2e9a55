"""Tokenizer of an exported folder, with which other tools encode a text as training and `mhmoe generate` do.

This package itself adds the start token before a text (`Boundaries.start`). Other tools leave this to the
post-processor of tokenizer.json, which an export adds. They take the names of special tokens from
tokenizer_config.json.
"""

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from mhmoe_ray.data.tokenizer import Boundaries, added_start_token, boundaries
from mhmoe_ray.data.tokenizer.vocabulary import unknown_token

TOKENIZER_CONFIG = "tokenizer_config.json"
_SAMPLE_TEXT = "A text of some words."


def add_start_token(content: bytes, start: int | None = None) -> bytes:
    """Return a tokenizer.json whose encoding of a text begins with the start token; unchanged if it does already.

    `start` is by default the token that `boundaries` finds in a tokenizer that `load_tokenizer` accepts.
    """
    tokenizer = Tokenizer.from_buffer(content)
    if start is None:
        start = boundaries(tokenizer).start
    if tokenizer.encode(_SAMPLE_TEXT).ids == [start, *tokenizer.encode(_SAMPLE_TEXT, add_special_tokens=False).ids]:
        return content
    token = tokenizer.id_to_token(start)
    template = TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, start)]
    )
    return _with_processors(tokenizer, content, [template])


def remove_start_token(content: bytes) -> bytes:
    """Return a tokenizer.json whose encoding begins with no added token; unchanged if there is none."""
    tokenizer = Tokenizer.from_buffer(content)
    return content if added_start_token(tokenizer) is None else _with_processors(tokenizer, content, [])


def _with_processors(tokenizer: Tokenizer, content: bytes, processors: list[TemplateProcessing]) -> bytes:
    """Return a tokenizer.json with other post-processors, beside which only a byte-level one stays."""
    # A byte-level processor only corrects offsets. Any other processor would add further tokens and is left out.
    byte_level_processors = [ByteLevel(**options)] if (options := _byte_level_options(content)) is not None else []
    tokenizer.post_processor = Sequence([*byte_level_processors, *processors])
    return tokenizer.to_str(pretty=True).encode()


def special_token(tokenizer: Tokenizer, settings: dict[str, Any], *names: str) -> int | None:
    """Return the id of the token that the first fitting key of tokenizer_config.json names; None without one.

    `names` are keys such as "bos_token", in the order in which they are tried.
    """
    for name in names:
        entry = settings.get(name)
        # Older versions of transformers write an object, whose key `content` has the token's text.
        text = entry.get("content") if isinstance(entry, dict) else entry
        # JSON can have half of a surrogate pair, which no token has.
        if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:
            continue
        if (token := tokenizer.token_to_id(text)) is not None:
            return token
    return None


def _byte_level_options(content: bytes) -> dict[str, bool] | None:
    """Return the options of the byte-level post-processor in a tokenizer.json; None without one."""
    post_processor = json.loads(content)["post_processor"] or {}
    for processor in (post_processor, *post_processor.get("processors", [])):
        if processor.get("type") == "ByteLevel":
            return {name: processor[name] for name in ("add_prefix_space", "trim_offsets", "use_regex")}
    return None


def tokenizer_identity(content: bytes) -> str:
    """Return a hash that is equal for tokenizer.json files that encode the text between special tokens alike."""
    # Other tools may write the same tokenizer in another form of JSON, or with a post-processor that adds other special
    # tokens to a text. So only the parts that encode text are hashed.
    parts = json.loads(Tokenizer.from_buffer(content).to_str())
    added_tokens = [(token["id"], token["content"]) for token in parts["added_tokens"]]
    identity_parts = [parts["model"], parts["normalizer"], parts["pre_tokenizer"], added_tokens]
    return hashlib.sha256(json.dumps(identity_parts, sort_keys=True).encode()).hexdigest()


def tokenizer_config(
    tokenizer: Tokenizer, edge_tokens: Boundaries, seq_len: int, chat_template: str | None = None
) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, which names the special tokens for other tools.

    `edge_tokens` has the start token and all end tokens; `chat_template` is Jinja text.
    """
    # The end token is preferably one that is not also the start token, such as </s> rather than <s>.
    end = tokenizer.id_to_token(max(edge_tokens.ends - {edge_tokens.start}, default=edge_tokens.start))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(edge_tokens.start),
        "eos_token": end,
        # The tokenizer has no token that is only for padding. Padding is masked, so any token can be used.
        "pad_token": end,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    unknown = unknown_token(tokenizer)
    return config if unknown is None else {**config, "unk_token": tokenizer.id_to_token(unknown)}
