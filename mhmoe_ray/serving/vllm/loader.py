"""Classes that vLLM gets from this project: the loader of a run's weights, and methods for vLLM's workers.

The weights come from a run's checkpoint, whatever the number of ranks that wrote it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from mhmoe_ray.checkpoint.huggingface.names import tensor_entries
from mhmoe_ray.checkpoint.load import WeightsReader
from mhmoe_ray.serving.vllm.folder import model_spec
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.storage import Location, location


class CheckpointLoader(BaseModelLoader):
    """Loader of the weights of a run's checkpoint, whose path is in the model's configuration."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Do nothing: vLLM requires this method, but the weights are read directly from the checkpoint."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Load the checkpoint's weights, which `read_manifest` has verified already."""
        config = model_config.hf_config
        model.load_weights(exported_tensors(location(config.checkpoint), model_spec(config)))


def exported_tensors(checkpoint: Location, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors in float32, with the names and shapes of an export for Hugging Face.

    A checkpoint of another model is a CheckpointError.
    """
    # A group has the tensors of one block, so only those of one block are in memory at a time.
    weights = WeightsReader(checkpoint)
    for group in tensor_entries(spec):
        tensors = {e.checkpoint_name: torch.empty(e.shape, dtype=torch.float32, device="cpu") for e in group}
        weights.load(tensors)
        for entry in group:
            yield from entry.split(tensors[entry.checkpoint_name]).items()


class WorkerExtension:
    """Methods that are added to vLLM's worker class, to count the routes."""

    model_runner: Any

    def mhmoe_counts(self) -> list[list[int]]:
        """Return the routes to each expert of each layer since `mhmoe_reset_counts`, complete on every rank."""
        counts: list[list[int]] = self.model_runner.get_model().route_counts()
        return counts

    def mhmoe_reset_counts(self) -> None:
        """Set the counts of routes to zero, after vLLM's own trial runs of the model."""
        self.model_runner.get_model().reset_counts()
