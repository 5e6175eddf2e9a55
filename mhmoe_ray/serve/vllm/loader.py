"""Classes that vLLM gets from this project: a model's configuration, the loader of its weights, and worker methods.

vLLM reads the configuration, a class of transformers' kind, from a folder in place of a checkpoint. The weights come
from a run's checkpoint, whatever the number of ranks that wrote it.
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
    """The configuration that `folder.write_folder` writes: sizes under vLLM's names, and this project's own fields."""

    model_type = FORMAT

    checkpoint: str = ""
    """Location of the checkpoint."""
    model: dict[str, Any] | None = None
    """The `model` section of the checkpoint's manifest."""

    vocab_size: int = 0
    """Number of tokens of the tokenizer; the model may have more rows, which no answer uses."""
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    num_experts: int = 0
    max_position_embeddings: int = 0
    rope_parameters: dict[str, Any] | None = None


class CheckpointLoader(BaseModelLoader):
    """Loader of the weights of a run's checkpoint."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Do nothing. vLLM requires this method; the weights are read where the checkpoint is."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Load the checkpoint's weights into the model; `read_manifest` has verified the checkpoint already."""
        config = model_config.hf_config
        model.load_weights(checkpoint_tensors(location(config.checkpoint), ModelSpec.model_validate(config.model)))


def checkpoint_tensors(checkpoint: Location, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the complete float32 values of each tensor of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is not one of this model.
    """
    with torch.device("meta"):
        shapes = Decoder(spec).named_tensors()
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(".".join(name.split(".")[:2]), []).append(name)
    # The tensors are read block by block, so only those of one block are in memory at a time.
    for names in groups.values():
        tensors = {name: torch.empty(shapes[name].shape, dtype=torch.float32, device="cpu") for name in names}
        load_tensors(checkpoint / "weights", tensors)
        yield from tensors.items()


class WorkerExtension:
    """Methods that are added to vLLM's worker class."""

    model_runner: Any

    def mhmoe_counts(self) -> list[list[int]]:
        """Return the routes per layer and expert since `mhmoe_reset_counts`.

        Every rank routes all rows, so each rank has the complete counts.
        """
        counts: list[list[int]] = self.model_runner.get_model().route_counts()
        return counts

    def mhmoe_reset_counts(self) -> None:
        """Reset the counts of routes, after vLLM's own trial runs of the model."""
        self.model_runner.get_model().reset_counts()
