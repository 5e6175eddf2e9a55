"""The classes that vLLM gets from this project: a model's configuration, the loader of its weights, and worker methods.

The configuration is a class of transformers' kind, read from a folder that stands in for a checkpoint. Weights come
from a run's checkpoint as it is, at whatever parallel size it was written.
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
    """The configuration that `folder.write_folder` writes: sizes under the names that vLLM looks for, and fields of our
    own."""

    model_type = FORMAT

    checkpoint: str = ""
    """Location of the checkpoint."""
    model: dict[str, Any] | None = None
    """The `model` section of the checkpoint's manifest."""

    vocab_size: int = 0
    """Number of tokens that the tokenizer has; the model may have more rows, which no answer uses."""
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    num_experts: int = 0
    max_position_embeddings: int = 0
    rope_parameters: dict[str, Any] | None = None


class CheckpointLoader(BaseModelLoader):
    def download_model(self, model_config: ModelConfig) -> None:
        """Do nothing: there is nothing to download."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Load the checkpoint's weights into the model. `read_manifest` has verified the checkpoint before."""
        config = model_config.hf_config
        model.load_weights(stored(location(config.checkpoint), ModelSpec.model_validate(config.model)))


def stored(checkpoint: Location, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a checkpoint, complete and by name, in float32; only one block's tensors are in memory at a
    time.

    Raises:
        CheckpointError: the checkpoint does not hold this model.
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
    """Methods that are added to vLLM's worker class."""

    model_runner: Any

    def mhmoe_counts(self) -> list[list[int]]:
        """Return the routes per layer and expert since `mhmoe_count_anew`.

        Every rank routes all rows, so each rank has the complete counts.
        """
        counts: list[list[int]] = self.model_runner.get_model().counts()
        return counts

    def mhmoe_count_anew(self) -> None:
        """Reset the counts of routes, after vLLM's own trial runs of the model."""
        self.model_runner.get_model().count_anew()
