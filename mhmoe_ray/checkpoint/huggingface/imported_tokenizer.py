"""Tokenizer and chat template of a folder in Hugging Face's layout, for imports and for runs that start from one."""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.huggingface.config import MhmoeSection, read_end_tokens
from mhmoe_ray.checkpoint.huggingface.tokenizer import (
    TOKENIZER_CONFIG,
    add_start_token,
    special_token,
    tokenizer_identity,
)
from mhmoe_ray.data.tokenizer import BEGIN_TOKEN, added_start_token, boundaries, find_boundaries, token_count
from mhmoe_ray.data.tokenizer.load import check_tokenizer, read_tokenizer
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.parsing import ParseError, parse_object
from mhmoe_ray.runs.directory import CHAT_TEMPLATE
from mhmoe_ray.storage import describe_file, read_file


class ImportedTokenizer(NamedTuple):
    """Tokenizer of an imported model, and the facts about it that the checkpoint's manifest records."""

    content: bytes
    """Content of tokenizer.json in the run directory."""
    adds_start: bool
    end_tokens: list[int]
    """Token ids that end a text, in addition to the tokenizer's own."""


def read_folder_tokenizer(source: Path, config: MhmoeSection) -> ImportedTokenizer:
    """Read and check the tokenizer of a folder in Hugging Face's layout.

    A missing, other or unreadable tokenizer.json is a CheckpointError. A tokenizer that does not fit the model, or
    without a token that can start a text, is a DataError.
    """
    file = source / "tokenizer.json"
    if not file.is_file():
        reason = "it has no tokenizer.json, which serving needs"
        raise CheckpointError(f"folder {source}", reason, "add the one the model was trained with")
    try:
        content, sha256 = file.read_bytes(), describe_file(file).sha256
    except OSError as e:
        reason = f"{file.name} cannot be read ({e.strerror or e})"
        raise CheckpointError(f"folder {source}", reason, "repair its disk, or get the folder again") from e
    tokenizer, settings = read_tokenizer(file), _read_settings(source)
    adds_start = config.adds_start
    if adds_start is None:
        # In transformers, a tokenizer with <s> adds it even without a post-processor, unless `add_bos_token` is false.
        default = tokenizer.token_to_id(BEGIN_TOKEN) is not None
        adds_start = added_start_token(tokenizer) is not None or bool(settings.get("add_bos_token", default))
    if find_boundaries(tokenizer) is None:
        start = special_token(tokenizer, settings, "bos_token", "cls_token", "eos_token", "pad_token")
        if start is not None:
            content = add_start_token(content, start)
            tokenizer = Tokenizer.from_buffer(content)
    check_tokenizer(tokenizer, file, config.model.vocab_size)
    if config.tokenizer_sha256 not in (None, sha256, tokenizer_identity(content)):
        reason = "its tokenizer.json is not the one the model was trained with"
        raise CheckpointError(f"folder {source}", reason, "restore that file")
    end_tokens = read_end_tokens(source, token_count(tokenizer))
    if (end_token := special_token(tokenizer, settings, "eos_token")) is not None:
        end_tokens.add(end_token)
    return ImportedTokenizer(content, adds_start, sorted(end_tokens - boundaries(tokenizer).ends))


def _read_settings(source: Path) -> dict[str, Any]:
    """Return the content of a folder's tokenizer_config.json, if there is one; CheckpointError if it cannot be read."""
    file = source / TOKENIZER_CONFIG
    try:
        return parse_object(read_file(file)) if file.exists() else {}
    except (OSError, ParseError) as e:
        raise CheckpointError(f"folder {source}", f"{file.name} cannot be read ({e})", "get the folder again") from e


def read_chat_template(source: Path) -> str | None:
    """Return the chat template of a folder in Hugging Face's layout; None without one.

    An unreadable template, or several without a default, is a CheckpointError.
    """
    # Newer folders have the template in a file of its own. In older ones it is an entry of tokenizer_config.json, which
    # is read below.
    file = source / CHAT_TEMPLATE
    if file.exists():
        try:
            return file.read_text()
        except (OSError, ValueError) as e:
            raise CheckpointError(
                f"folder {source}", f"{file.name} cannot be read ({e})", "get the folder again"
            ) from e
    template = _read_settings(source).get("chat_template")
    if isinstance(template, list):
        template = _default_template(template)
    if template is None or isinstance(template, str):
        return template
    reason = f"the chat_template in its {TOKENIZER_CONFIG} is no text, nor a list with one that is named default"
    raise CheckpointError(f"folder {source}", reason, f"put the one to use into {CHAT_TEMPLATE} beside it")


def _default_template(templates: list[Any]) -> Any:
    """Return the template named "default" in a list of {"name": ..., "template": ...}; without one, the list itself."""
    templates_by_name = {
        t["name"]: t.get("template") for t in templates if isinstance(t, dict) and isinstance(t.get("name"), str)
    }
    return templates_by_name.get("default") or templates
