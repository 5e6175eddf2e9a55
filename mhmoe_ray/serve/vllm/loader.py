"""Weights from a run's checkpoint, as it lies, at whatever parallel size it was written."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from mhmoe_ray.checkpoint.load import load_tensors
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.storage import Location, location


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
