"""Tests of training, serving and measuring on a GPU; losses and answers are compared with those of a CPU.

The tests also run on the CPU, and only there if there is no GPU. They need neither Ray nor an installation of this
project: `make test-gpu` runs them on a machine where nothing can be installed.
"""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from mhmoe_ray.bench.acceptance.steps import VARIANTS, make_spec
from mhmoe_ray.bench.checkpoints import CheckpointCase
from mhmoe_ray.bench.layers import LayerShape
from mhmoe_ray.bench.measure import LayerRequest, measure
from mhmoe_ray.bench.steps import StepCase
from mhmoe_ray.bench.timing import find_hardware
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.serving.engine import Request, SamplingParams
from mhmoe_ray.serving.engine.torch_engine import own_engine
from mhmoe_ray.spec import ServeSpec

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)
every_device = pytest.mark.parametrize("device", ["cpu", CUDA])
pytestmark = pytest.mark.long


def train(spec, device, steps=3):
    """Return the losses of training steps, and the parameters after them on the CPU."""
    case = StepCase(spec, torch.device(device))
    losses = [case.step() for _ in range(steps)]
    return losses, [p.detach().cpu() for p in case.trainer.model.parameters()]


# Compilation takes long on a CPU.
CASES = [("cpu", variant) for variant in VARIANTS if variant != "compile"]
CASES += [pytest.param("cuda", variant, marks=CUDA.marks) for variant in VARIANTS]


@pytest.mark.parametrize(("device", "variant"), CASES)
def test_training_has_the_losses_of_a_cpu(device, variant):
    spec = make_spec(variant, "float32", is_toy=True)
    losses, parameters = train(spec, device)
    expected_losses, expected_parameters = train(spec, "cpu")
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for parameter, expected in zip(parameters, expected_parameters, strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-2, atol=1e-3)


@pytest.fixture
def process_group():
    """Start a process group with this process as its only rank."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_device
@pytest.mark.parametrize(("strategy", "wrapper"), [("ddp", DistributedDataParallel), ("fsdp", FSDPModule)])
def test_strategies_train_alike_on_one_rank(request, device, strategy, wrapper):
    spec = make_spec("multi-head", "float32", is_toy=True)
    # Without a process group, no strategy wraps the model.
    plain_case = StepCase(spec, torch.device("cpu"))
    assert plain_case.trainer.strategy.module is plain_case.trainer.model
    expected_losses = [plain_case.step() for _ in range(3)]
    request.getfixturevalue("process_group")
    cluster = spec.cluster.model_copy(update={"strategy": strategy})
    case = StepCase(spec.model_copy(update={"cluster": cluster}), torch.device(device))
    assert isinstance(case.trainer.strategy.module, wrapper)
    assert [case.step() for _ in range(3)] == pytest.approx(expected_losses, rel=1e-4)


@every_device
def test_checkpoints_hold_training_up_only_briefly(tmp_path, device):
    spec = make_spec("multi-head", "bfloat16", is_toy=True)
    case = CheckpointCase(spec, tmp_path, torch.device(device))
    assert case.state_bytes > 0
    seconds = [case.time_checkpoint() for _ in range(2)][-1]
    assert 0 < seconds.pause <= seconds.committed


def answer_tokens(device, prompts):
    """Return the greedy answers of our engine to prompts of token ids, in float32."""
    spec = make_spec("multi-head", "float32", is_toy=True)
    model = Decoder(spec.model)
    init_weights(model, 0)
    settings = ServeSpec(
        precision="float32", gpus_per_replica=int(device == "cuda"), cache_tokens=64, max_concurrency=4
    )
    engine = own_engine(model.eval(), frozenset(), spec.model.vocab_size, spec.data.seq_len, settings)

    async def answer(prompt):
        request = Request(tuple(prompt), SamplingParams(max_tokens=6, temperature=0))
        return [token async for update in engine.generate(request) for token in update.tokens]

    async def answer_all():
        return await asyncio.gather(*map(answer, prompts))

    try:
        return asyncio.run(answer_all())
    finally:
        engine.close()


@every_device
def test_serving_gives_the_answers_of_a_cpu(device):
    prompts = [[1, 2, 3], [7], [5, 4, 3, 2, 1, 0]]
    assert answer_tokens(device, prompts) == answer_tokens("cpu", prompts)


@every_device
def test_layers_are_measured(device):
    request = LayerRequest(LayerShape(16, 32, 4, 2, 16), heads=(2,), dtype="float32", rounds=1)
    lines = []
    measurements = measure(request, find_hardware(device), lines.append)
    assert {figures.name for figures in measurements.figures} >= {"dense", "SMoE", "MH-MoE h 2"}
    assert all(figures.median > 0 and figures.peak_bytes > 0 for figures in measurements.figures)


def test_this_module_needs_no_ray():
    code = "import sys; sys.modules['ray'] = None; import tests.gpu.test_device"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
