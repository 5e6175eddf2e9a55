"""The memory that a rank uses while a run starts, and the weights that it begins with."""

import pytest
import torch

from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from tests.ranks import run_ranks
from tests.specs import tiny_spec
from tests.train import jobs

MODEL = {**tiny_spec().model.model_dump(), "vocab_size": 300, "d_model": 128, "layers": 8, "d_ff": 256}
MOE = {"heads": 2, "experts": 8, "top_k": 2, "d_expert": 128}


def spread(strategy, **cluster):
    cluster = {"workers": 4, "ep": 2, "strategy": strategy, "shard_experts": strategy == "fsdp", **cluster}
    return tiny_spec(model={**MODEL, "moe": MOE}, cluster=cluster)


def begun(spec):
    """Return the peak of allocated bytes while a trainer is built, the bytes that remain, and the weights."""
    trainers = []
    peak = peak_bytes(lambda: trainers.append(jobs.trainer_of(spec)), torch.device("cpu"))
    held = sum(
        (t.to_local() if hasattr(t, "to_local") else t).nbytes for t in trainers[0].strategy.model.tensors().values()
    )
    return peak, held, jobs.whole(trainers[0].strategy.weights())


def test_zero_compiles_nothing(tmp_path, monkeypatch):
    """A compilation leaves a lock when its process is killed, and later processes would wait for that lock forever."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    run_ranks(2, begun, spread("zero1", workers=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_rank_begins_with_what_it_holds_and_one_tensor_more(strategy):
    spec = spread(strategy)
    model = Decoder(spec.model)
    init_weights(model, spec.seed)
    whole = {name: t.detach() for name, t in model.named_parameters()}
    dense = [t.nbytes for name, t in whole.items() if ".experts." not in name]
    experts = sum(t.nbytes for name, t in whole.items() if ".experts." in name)
    for peak, held, weights in run_ranks(4, begun, spec):
        assert all(torch.equal(weights[name], t) for name, t in whole.items())
        if strategy == "fsdp":
            assert held == pytest.approx(sum(t.nbytes for t in whole.values()) / 4, rel=0.02)
            assert peak < held + 2 * max(dense)
        else:
            assert held == sum(dense) + experts / spec.cluster.ep
            # DDP flattens all that it averages, once to send it and once for gradients; gloo may let go of the first
            # too late for the second. That is less than the model held twice, with one of the two.
            assert peak < held + 2 * sum(dense) + max(dense) < 2 * held + sum(dense)
        assert peak >= held
