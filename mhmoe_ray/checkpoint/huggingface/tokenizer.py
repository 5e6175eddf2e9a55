"""Tokenizer of an exported folder: a plain string gives the token ids that training and `mhmoe generate` use.

This package puts the start token before a text itself (`Boundaries.start`). Other tools leave that to tokenizer.json,
whose post-processor adds it in an exported folder, and take the names of special tokens from tokenizer_config.json.
"""

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from mhmoe_ray.data.tokenizer import boundaries
from mhmoe_ray.data.tokenizer.vocabulary import unknown_token

TOKENIZER_CONFIG = "tokenizer_config.json"
_TEXT = "A text of some words."


def adding_start(content: bytes) -> bytes:
    """Return a tokenizer.json whose encoding of a text begins with the start token; unchanged if it does so already.

    Args:
        content: content of a tokenizer.json that `load_tokenizer` takes.
    """
    tokenizer = Tokenizer.from_buffer(content)
    start = boundaries(tokenizer).start
    if tokenizer.encode(_TEXT).ids == [start, *tokenizer.encode(_TEXT, add_special_tokens=False).ids]:
        return content
    token = tokenizer.id_to_token(start)
    template = TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, start)]
    )
    # A byte-level processor only corrects offsets; any other one would add tokens beside ours.
    kept = [ByteLevel(**options)] if (options := _byte_level(content)) is not None else []
    tokenizer.post_processor = Sequence([*kept, template])
    return tokenizer.to_str(pretty=True).encode()


def _byte_level(content: bytes) -> dict[str, bool] | None:
    """Return the options of the byte-level post-processor; None if there is none."""
    outer = json.loads(content)["post_processor"] or {}
    for processor in (outer, *outer.get("processors", [])):
        if processor.get("type") == "ByteLevel":
            return {name: processor[name] for name in ("add_prefix_space", "trim_offsets", "use_regex")}
    return None


def tokenizer_identity(content: bytes) -> str:
    """Return a hash of what a tokenizer.json makes of a text between special tokens.

    The hash is equal for files that differ in form, or in the special tokens that they add, as other tools write them.

    Args:
        content: content of a tokenizer.json.
    """
    parts = json.loads(Tokenizer.from_buffer(content).to_str())
    added = [(token["id"], token["content"]) for token in parts["added_tokens"]]
    meaning = [parts["model"], parts["normalizer"], parts["pre_tokenizer"], added]
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def tokenizer_config(content: bytes, seq_len: int) -> dict[str, Any]:
    """Return the content of tokenizer_config.json.

    Args:
        content: content of the tokenizer.json beside it.
        seq_len: number of tokens that the model sees at once.
    """
    tokenizer = Tokenizer.from_buffer(content)
    edges = boundaries(tokenizer)
    # Where another token than the first ends a text, it is the last one: of <s> and </s> the latter.
    end = tokenizer.id_to_token(max(edges.ends - {edges.start}, default=edges.start))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(edges.start),
        "eos_token": end,
        # There is no token for padding alone: what is padded is masked, so that any token will do.
        "pad_token": end,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    unknown = unknown_token(tokenizer)
    return config if unknown is None else {**config, "unk_token": tokenizer.id_to_token(unknown)}
