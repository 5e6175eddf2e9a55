"""Import of adapters that PEFT made: read a folder in its layout as low-rank terms of its base's matrices."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from mhmoe_ray.checkpoint.huggingface.config import ADAPTER_CONFIG, error_text, is_adapter_folder
from mhmoe_ray.checkpoint.huggingface.files import open_tensors, report_read_errors
from mhmoe_ray.checkpoint.huggingface.hub import PREFIX as HUB_PREFIX
from mhmoe_ray.checkpoint.huggingface.hub import settings_folder
from mhmoe_ray.checkpoint.huggingface.peft_layout import (
    ADAPTER_WEIGHTS,
    PREFIX,
    LowRankTerm,
    PeftTarget,
    peft_targets,
    stored_targets,
)
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
_TENSOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


class PeftConfig(BaseModel):
    """Keys of adapter_config.json that decide what a LoRA adapter computes."""

    model_config = ConfigDict(extra="allow")

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: PositiveInt
    lora_alpha: float
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_parameters: list[str] | None = None
    use_rslora: bool = False
    init_lora_weights: Any = True

    def scale(self, key: str, rank: int) -> float:
        """Return the factor of B A for the target `key`; ValueError if it should have another rank."""
        expected_rank = _matching_value(self.rank_pattern or {}, key, self.r)
        if rank != expected_rank:
            raise ValueError(f"{key} has rank {rank}, not {expected_rank}")
        return _matching_value(self.alpha_pattern or {}, key, self.lora_alpha) / (
            rank**0.5 if self.use_rslora else rank
        )


def _matching_value(patterns: Mapping[str, float], key: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a name, as PEFT does."""
    return next((v for pattern, v in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", key)), default)


def model_folder(source: Path, download: Callable[[str], Path] = settings_folder) -> Path:
    """Return the folder of a model: that of its base for an adapter's folder, and the folder itself for any other.

    `download` gets a base that is on the hub. A base that cannot be found is a CheckpointError.
    """
    if not is_adapter_folder(source):
        return source
    config = _read_config(source)
    base = config.base_model_name_or_path or ""
    if base and Path(base).is_dir():
        return Path(base)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return download(f"{HUB_PREFIX}{base}" + (f"@{config.revision}" if config.revision else ""))
    reason = f"the base of the adapter ({base or 'none is named'}) is no folder and no model of the hub"
    raise CheckpointError(f"folder {source}", reason, f"correct base_model_name_or_path in its {ADAPTER_CONFIG}")


def read_adapter(source: Path, model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LowRankTerm]:
    """Return the terms of an adapter's folder, by the exported names of the matrices; none for a model's folder.

    `shapes` are those of the base's exported tensors. An adapter of another kind or shape, or one that changes nothing,
    is a CheckpointError.
    """
    if not is_adapter_folder(source):
        return {}
    config, subject = _read_config(source), f"folder {source}"
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")]
    # Under transformers 4, each expert's matrix is a linear layer.
    targets = {
        name.removesuffix(".weight"): PeftTarget(name.removesuffix(".weight"), None, [[name]]) for name in matrices
    }
    targets |= stored_targets(peft_targets(model_type, matrices), config.target_parameters or ())
    terms: dict[str, LowRankTerm] = {}
    with (
        report_read_errors(subject, "repair its disk, or get the folder again"),
        open_tensors(source, ADAPTER_WEIGHTS) as stored,
    ):
        modules = set()
        for name in sorted(stored.names):
            match = _TENSOR.fullmatch(name)
            if match is None or match["module"] not in targets:
                raise CheckpointError(
                    subject, f"{name} adapts nothing that is known in a {model_type}", "merge it with PEFT"
                )
            stored.dtype(name)
            modules.add(match["module"])
        for module in sorted(modules):
            a_name, b_name = (f"{PREFIX}{module}.lora_{part}.weight" for part in "AB")
            if not {a_name, b_name} <= stored.names:
                raise CheckpointError(subject, f"{module} lacks one of lora_A and lora_B", "get the folder again")
            target = targets[module]
            a_shape, b_shape, experts = stored.shape(a_name), stored.shape(b_name), len(target.stack)
            out_width = sum(shapes[name][0] for name in target.stack[0])
            rank = a_shape[0] // experts
            expected = (rank * experts, shapes[target.stack[0][0]][1]), (out_width, rank * experts)
            if (a_shape, b_shape) != expected:
                shapes_text = f"{a_shape} and {b_shape}, and its base needs {expected[0]} and {expected[1]}"
                fix = "use the base that the adapter was made for"
                raise CheckpointError(subject, f"{module} has matrices of shapes {shapes_text}", fix)
            is_parameter = any(f".{module}.weight".endswith(f".{name}") for name in config.target_parameters or ())
            key = f"{module}.weight" if is_parameter else target.key
            try:
                scale = config.scale(key, rank)
            except (ValueError, re.error) as e:
                raise CheckpointError(subject, f"{ADAPTER_CONFIG}: {e}", "get the folder again") from e
            terms |= target.decode(stored.read(a_name), stored.read(b_name), scale)
    if not any(term.b.any() for term in terms.values()):
        raise CheckpointError(subject, "its adapter changes nothing, because all its matrices B are zero", "train it")
    return terms


def _read_config(source: Path) -> PeftConfig:
    """Return the content of adapter_config.json; a kind of adapter that is not computed here is a CheckpointError."""
    subject = f"folder {source}"
    try:
        config = PeftConfig.model_validate(
            {"r": 1, "lora_alpha": 1, **parse_object(read_file(source / ADAPTER_CONFIG))}
        )
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
