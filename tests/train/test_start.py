"""Tests of the peak memory of a rank at the start of a run, and of its initial weights."""

import pytest
import torch

from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from tests.support.ranks import run_ranks
from tests.support.specs import tiny_spec
from tests.train import jobs

MODEL = {**tiny_spec().model.model_dump(), "vocab_size": 300, "d_model": 128, "layers": 8, "d_ff": 256}
MOE = {"heads": 2, "experts": 8, "top_k": 2, "d_expert": 128}


def parallel_spec(strategy, **cluster):
    cluster = {"workers": 4, "ep": 2, "strategy": strategy, "shard_experts": strategy == "fsdp", **cluster}
    return tiny_spec(model={**MODEL, "moe": MOE}, cluster=cluster)


def measure_start(spec):
    """Build a trainer, and return this rank's peak memory meanwhile, the memory of its model, and the full weights.

    Both memory sizes are in bytes. The model's memory is that of the rank's shards of weights and other tensors.
    """
    trainers = []
    peak = peak_bytes(lambda: trainers.append(jobs.build_trainer(spec)), torch.device("cpu"))
    held_bytes = sum(
        (t.to_local() if hasattr(t, "to_local") else t).nbytes
        for t in trainers[0].strategy.model.named_tensors().values()
    )
    return peak, held_bytes, jobs.full_tensors(trainers[0].strategy.checkpoint_weights())


def test_zero_compiles_no_extension(tmp_path, monkeypatch):
    """A compilation leaves a lock if its process is killed, and later processes would wait for that lock forever."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    run_ranks(2, measure_start, parallel_spec("zero1", workers=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_peak_memory_at_start_is_held_bytes_and_one_tensor(strategy):
    spec = parallel_spec(strategy)
    model = Decoder(spec.model)
    init_weights(model, spec.seed)
    full_tensors = {name: t.detach() for name, t in model.named_parameters()}
    dense_bytes = [t.nbytes for name, t in full_tensors.items() if ".experts." not in name]
    expert_bytes = sum(t.nbytes for name, t in full_tensors.items() if ".experts." in name)
    for peak, held_bytes, weights in run_ranks(4, measure_start, spec):
        assert all(torch.equal(weights[name], t) for name, t in full_tensors.items())
        if strategy == "fsdp":
            assert held_bytes == pytest.approx(sum(t.nbytes for t in full_tensors.values()) / 4, rel=0.02)
            assert peak < held_bytes + 2 * max(dense_bytes)
        else:
            assert held_bytes == sum(dense_bytes) + expert_bytes / spec.cluster.ep
            # DDP copies the tensors that it averages to a flat buffer: once to send them, and once for gradients. gloo
            # may free the first buffer too late, so both may exist. The bound is less than two copies of the model and
            # one buffer.
            assert peak < held_bytes + 2 * sum(dense_bytes) + max(dense_bytes) < 2 * held_bytes + sum(dense_bytes)
        assert peak >= held_bytes
