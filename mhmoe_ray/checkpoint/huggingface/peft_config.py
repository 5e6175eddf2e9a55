"""adapter_config.json of adapters in PEFT's layout, and the base that it names."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from mhmoe_ray.checkpoint.huggingface.config import ADAPTER_CONFIG, error_text, is_adapter_folder
from mhmoe_ray.checkpoint.huggingface.hub import PREFIX as HUB_PREFIX
from mhmoe_ray.checkpoint.huggingface.hub import settings_folder
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.parsing import ParseError, parse_object
from mhmoe_ray.storage import read_file

_NEUTRAL_KEYS = {
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "target_modules",
    "task_type",
}
"""Keys of adapter_config.json that do not change what a trained adapter computes, given its tensors."""
_NEUTRAL_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is."""


class PeftConfig(BaseModel):
    """Keys of adapter_config.json that decide what a LoRA adapter computes."""

    model_config = ConfigDict(extra="allow")

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: PositiveInt
    lora_alpha: float
    rank_pattern: dict[re.Pattern[str], PositiveInt] | None = None
    alpha_pattern: dict[re.Pattern[str], float] | None = None
    target_parameters: list[str] | None = None
    use_rslora: bool = False
    init_lora_weights: Any = True

    def rank_and_scale(self, key: str) -> tuple[int, float]:
        """Return the rank of the adapter of a target, and the factor of its B A."""
        rank = int(_matching_value(self.rank_pattern, key, self.r))
        alpha = _matching_value(self.alpha_pattern, key, self.lora_alpha)
        return rank, alpha / (rank**0.5 if self.use_rslora else rank)


def _matching_value(patterns: Mapping[re.Pattern[str], float] | None, key: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a name, as PEFT does."""
    items = (patterns or {}).items()
    return next((value for p, value in items if re.fullmatch(rf"(.*\.)?({p.pattern})", key)), default)


def model_folder(source: Path, download: Callable[[str], Path] = settings_folder) -> Path:
    """Return the folder of a model: that of its base for an adapter's folder, and the folder itself for any other.

    `download` gets a base that is on the hub. A base that cannot be found is a CheckpointError.
    """
    if not is_adapter_folder(source):
        return source
    config = read_peft_config(source)
    base = config.base_model_name_or_path or ""
    if base and Path(base).is_dir():
        return Path(base)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return download(f"{HUB_PREFIX}{base}" + (f"@{config.revision}" if config.revision else ""))
    reason = f"the base of the adapter ({base or 'none is named'}) is no folder and no model of the hub"
    raise CheckpointError(f"folder {source}", reason, f"correct base_model_name_or_path in its {ADAPTER_CONFIG}")


def read_peft_config(source: Path) -> PeftConfig:
    """Return the content of adapter_config.json; a kind of adapter that is not computed here is a CheckpointError."""
    subject = f"folder {source}"
    try:
        fields = parse_object(read_file(source / ADAPTER_CONFIG))
        config = PeftConfig.model_validate({"r": 1, "lora_alpha": 1, **fields})
    except OSError as e:
        raise CheckpointError(subject, f"its {ADAPTER_CONFIG} cannot be read ({e.strerror})", "make it readable") from e
    except (ParseError, ValidationError) as e:
        raise CheckpointError(subject, f"{ADAPTER_CONFIG}: {error_text(e)}", "get the folder again") from e
    refused_keys = {
        key: value
        for key, value in (config.model_extra or {}).items()
        if key not in _NEUTRAL_KEYS and value not in (None, False, "none", [], {})
    }
    if config.init_lora_weights not in _NEUTRAL_INITIALIZATIONS:
        refused_keys["init_lora_weights"] = config.init_lora_weights
    if config.peft_type != "LORA":
        refused_keys = {"peft_type": config.peft_type}
    if refused_keys:
        key, value = next(iter(refused_keys.items()))
        reason = f"{key} is {value!r} in its {ADAPTER_CONFIG}, and only plain LoRA is imported"
        raise CheckpointError(subject, reason, "merge the adapter into its base with PEFT, and import the result")
    return config
