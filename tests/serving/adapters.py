"""Checkpoints with random adapters of the served model."""

from pathlib import Path

import torch

from mhmoe_ray.checkpoint.manifest import AdapterRecord, checkpoint_name, stored_manifest
from mhmoe_ray.model.adapter import add_adapters
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec.adapter import AdapterSpec
from tests.serving.conftest import SEQ_LEN, SPEC, build_model, save_checkpoint
from tests.support.saved import commit_checkpoint, save_tensors


def save_adapter(run: Path, seed: int, rank: int = 4, targets=(), model=SPEC) -> Path:
    """Write a base and an adapter of it, as a run with `train.adapter` does, and return the adapter's checkpoint."""
    base = save_checkpoint(run, 0, build_model(model))
    spec = AdapterSpec(rank=rank, targets=list(targets))
    with torch.device("meta"):
        adapted = Decoder(model)
        add_adapters(adapted, spec)
    g = torch.Generator().manual_seed(seed)
    tensors = {name: 0.3 * torch.randn(p.shape, generator=g) for name, p in adapted.trained_parameters().items()}
    checkpoint = base.with_name(checkpoint_name(1, 1))
    save_tensors(checkpoint / "weights", tensors)
    record = AdapterRecord(spec=spec, base=base.name, base_sha256=stored_manifest(base).weights_sha256)
    commit_checkpoint(checkpoint, model, seq_len=SEQ_LEN, adapter=record)
    return checkpoint
