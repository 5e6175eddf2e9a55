"""Tokenizer of an exported folder: other tools encode a text to the token ids that training and `mhmoe generate` use.

This package itself adds the start token before a text (`Boundaries.start`). Other tools leave this to the
post-processor of tokenizer.json, which an export adds. They take the names of special tokens from
tokenizer_config.json.
"""

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from mhmoe_ray.data.tokenizer import boundaries
from mhmoe_ray.data.tokenizer.vocabulary import unknown_token

TOKENIZER_CONFIG = "tokenizer_config.json"
_SAMPLE_TEXT = "A text of some words."


def add_start_token(content: bytes) -> bytes:
    """Change a tokenizer.json so that its encoding of a text begins with the start token, and return its new content.

    If its encoding already does, the content is returned unchanged.

    Args:
        content: content of a tokenizer.json that `load_tokenizer` accepts.
    """
    tokenizer = Tokenizer.from_buffer(content)
    start = boundaries(tokenizer).start
    if tokenizer.encode(_SAMPLE_TEXT).ids == [start, *tokenizer.encode(_SAMPLE_TEXT, add_special_tokens=False).ids]:
        return content
    token = tokenizer.id_to_token(start)
    template = TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, start)]
    )
    # A byte-level processor only corrects offsets. Any other processor would add further tokens and is left out.
    byte_level_processors = [ByteLevel(**options)] if (options := _byte_level_options(content)) is not None else []
    tokenizer.post_processor = Sequence([*byte_level_processors, template])
    return tokenizer.to_str(pretty=True).encode()


def _byte_level_options(content: bytes) -> dict[str, bool] | None:
    """Return the options of the byte-level post-processor; None if there is none."""
    post_processor = json.loads(content)["post_processor"] or {}
    for processor in (post_processor, *post_processor.get("processors", [])):
        if processor.get("type") == "ByteLevel":
            return {name: processor[name] for name in ("add_prefix_space", "trim_offsets", "use_regex")}
    return None


def tokenizer_identity(content: bytes) -> str:
    """Return a hash that is equal for tokenizers that encode the text between special tokens alike.

    Args:
        content: content of a tokenizer.json.
    """
    # Other tools write the same tokenizer in another form, or with other special tokens that it adds.
    parts = json.loads(Tokenizer.from_buffer(content).to_str())
    added_tokens = [(token["id"], token["content"]) for token in parts["added_tokens"]]
    identity_parts = [parts["model"], parts["normalizer"], parts["pre_tokenizer"], added_tokens]
    return hashlib.sha256(json.dumps(identity_parts, sort_keys=True).encode()).hexdigest()


def tokenizer_config(content: bytes, seq_len: int, chat_template: str | None = None) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, which names the special tokens for other tools.

    Args:
        content: content of the tokenizer.json in the same folder.
        seq_len: number of tokens that the model sees at once.
        chat_template: Jinja template that turns a conversation into a prompt; None if there is none.
    """
    tokenizer = Tokenizer.from_buffer(content)
    edge_tokens = boundaries(tokenizer)
    # If another token than the start token ends a text, take it: </s> and not <s>.
    end = tokenizer.id_to_token(max(edge_tokens.ends - {edge_tokens.start}, default=edge_tokens.start))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(edge_tokens.start),
        "eos_token": end,
        # There is no token for padding only. Padding is masked, so any token can be used.
        "pad_token": end,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    unknown = unknown_token(tokenizer)
    return config if unknown is None else {**config, "unk_token": tokenizer.id_to_token(unknown)}
