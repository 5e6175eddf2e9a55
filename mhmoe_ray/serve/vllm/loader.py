"""What vLLM is given of ours: the configuration of a model, the loader of its weights, and what workers can be asked.

The configuration is a class of transformers' kind, read from a folder that stands for a checkpoint; weights come from a
run's checkpoint as it lies, at whatever parallel size it was written.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from mhmoe_ray.checkpoint.load import load_tensors
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.serve.vllm.folder import FORMAT
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.storage import Location, location


class MhmoeConfig(PreTrainedConfig):
    """What `folder.write_folder` writes: sizes under the names that vLLM looks for, and beside them what is ours."""

    model_type = FORMAT

    checkpoint: str = ""
    """A location."""
    model: dict[str, Any] | None = None
    """The `model` section of the checkpoint's manifest."""

    vocab_size: int = 0
    """Tokens that the tokenizer has; the model may have more rows, which no answer takes."""
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    num_experts: int = 0
    max_position_embeddings: int = 0
    rope_parameters: dict[str, Any] | None = None


class CheckpointLoader(BaseModelLoader):
    def download_model(self, model_config: ModelConfig) -> None:
        """There is nothing to copy."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Fill a model of ours. The checkpoint was looked at before (`read_manifest`)."""
        config = model_config.hf_config
        model.load_weights(stored(location(config.checkpoint), ModelSpec.model_validate(config.model)))


def stored(checkpoint: Location, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """All whole tensors of a checkpoint by name, of which never more than one block's are in memory.

    Raises:
        CheckpointError: it does not hold this model.
    """
    with torch.device("meta"):
        shapes = Decoder(spec).tensors()
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(".".join(name.split(".")[:2]), []).append(name)
    for names in groups.values():
        whole = {name: torch.empty(shapes[name].shape, dtype=torch.float32, device="cpu") for name in names}
        load_tensors(checkpoint / "weights", whole)
        yield from whole.items()


class WorkerExtension:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def mhmoe_counts(self) -> list[list[int]]:
        """Routes per layer and expert since `mhmoe_count_anew`. All ranks route all rows, so that each has the whole
        count."""
        counts: list[list[int]] = self.model_runner.get_model().counts()
        return counts

    def mhmoe_count_anew(self) -> None:
        """Of what follows alone: until then vLLM has only tried the model."""
        self.model_runner.get_model().count_anew()
