"""Planned memory against what autograd really keeps of a step, and what torch's optimizer really holds."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState
from torch.distributed.tensor import DTensor

from mhmoe_ray.architectures import ARCHITECTURES
from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.model.decoder import Decoder, routing_loss, token_losses
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.planner.expert_step import assumed_kernel, may_be_compiled
from mhmoe_ray.planner.memory import checkpoint_copy, memory, whole_gradients, whole_weights
from mhmoe_ray.planner.sizes import blocks, sizes
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.spec.model import ROUTERS
from mhmoe_ray.train.step import Trainer
from tests.checkpoint.test_load import new_run
from tests.kernels.test_cpp import COMPILES
from tests.ranks import run_ranks
from tests.specs import tiny_spec
from tests.train.jobs import micro_batches, trainer_of

TRUNK = {"vocab_size": 500, "d_model": 96, "layers": 3, "attention_heads": 4, "d_ff": 200}
KINDS = {
    **{name: {"backbone": name} for name in ARCHITECTURES},
    "grouped-queries": {"kv_heads": 2, "tied_embeddings": False},
    "dropout": {"backbone": "subln", "dropout": 0.1},
    "masks": {"document_masks": True},
}
EXPERTS = {
    "dense": None,
    "plain": {"heads": 1, "experts": 5, "top_k": 1, "d_expert": 100, "d_shared": 60, "every": 1, "kernel": "grouped"},
    "multi-head": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 40, "kernel": "grouped"},
    "recomputed": {"heads": 4, "experts": 4, "top_k": 2, "d_expert": 200, "kernel": "grouped"},
    "kept": {"heads": 4, "experts": 4, "top_k": 2, "d_expert": 200, "recompute": 0, "kernel": "grouped"},
    "not kept": {"heads": 4, "experts": 4, "top_k": 2, "d_expert": 200, "recompute": 1, "kernel": "grouped"},
    "projected": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 40, "projection_layers": 3, "kernel": "grouped"},
    "jitter": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 40, "jitter": 0.1, "kernel": "grouped"},
    "plain jitter": {"heads": 1, "experts": 4, "top_k": 2, "d_expert": 40, "jitter": 0.1, "kernel": "grouped"},
    "static": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 40, "capacity_factor": 1.0, "kernel": "capacity"},
    **{
        f"router {name}": {
            "heads": 4,
            "experts": 16,
            "top_k": 3,
            "d_expert": 80,
            "router": name,
            "kernel": "grouped",
        }
        for name in ROUTERS
    },
}


def spec_of(kind, experts, precision="float32") -> RunSpec:
    train = {"micro_batch_size": 2, "precision": precision}
    model = {**TRUNK, **KINDS[kind], "moe": EXPERTS[experts]}
    if experts == "plain":
        model["d_ff"] = None
    seq_len = 192 if kind == "masks" else 64  # at which the mask is more than what the test lets pass
    return tiny_spec(model=model, data={"seq_len": seq_len}, train=train)


class Kept:
    """Hook that adds up the bytes of all storages that a graph holds, except the weights themselves."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._kept: dict[int, torch.Tensor] = {}  # held, so that no two share an address

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        address = t.untyped_storage().data_ptr()
        if address not in self._weights:
            self._kept[address] = t
        return t

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self._kept.values())


def kept_by_autograd(spec: RunSpec) -> int:
    model = Decoder(spec.model)
    init_weights(model, 0)
    keep = Kept(model)
    token_BT = torch.randint(spec.model.vocab_size, (spec.train.micro_batch_size, spec.data.seq_len + 1))
    bfloat16 = spec.train.precision == "bfloat16"
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            document_BT = (token_BT[:, :-1] < 20).cumsum(1) if spec.model.document_masks else None
            output = model(token_BT[:, :-1], noise=Noise(0, 0), document_BT=document_BT)
        loss = token_losses(output.logits_BTV, token_BT[:, 1:]).mean()
        if spec.model.moe:
            loss = loss + routing_loss(spec.model, output.routing)
    assert loss.requires_grad
    return keep.bytes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_that_a_micro_batch_keeps(kind, experts, precision):
    spec = spec_of(kind, experts, precision)
    found = memory(spec)
    assert found.activations + found.copies == pytest.approx(kept_by_autograd(spec), rel=0.01)


@pytest.mark.skipif(not COMPILES, reason="kernel cpp cannot be compiled here")
def test_activations_of_compiled_experts():
    spec = spec_of("llama", "multi-head", "bfloat16")
    assert spec.model.moe is not None
    compiled = spec.model.with_moe(spec.model.moe.model_copy(update={"kernel": "cpp"}))
    found = memory(spec.model_copy(update={"model": compiled}))
    kept = kept_by_autograd(spec.model_copy(update={"model": compiled}))
    assert found.activations + found.copies == pytest.approx(kept, rel=0.01)
    assert found.activations < memory(spec).activations


@pytest.mark.parametrize("kind", ["llama", "subln"])
def test_activations_of_experts_that_keep_all(kind):
    """The experts are wide, so that `grouped` would keep less of them; `reference` keeps the places of routes too."""
    spec = spec_of(kind, "recomputed")
    plain = spec.model.with_moe(spec.model.moe.model_copy(update={"kernel": "reference"}))
    spec = spec.model_copy(update={"model": plain})
    assert memory(spec).activations == pytest.approx(kept_by_autograd(spec), rel=0.03)


@pytest.mark.parametrize(
    ("gpus", "precision", "d_model", "kernel"),
    [
        (1, "bfloat16", 512, "triton"),
        (1, "bfloat16", 514, "grouped"),  # rows of 257
        (1, "float32", 512, "grouped"),
        (0, "bfloat16", 512, "grouped"),
    ],
)
def test_auto_keeps_what_the_kernel_keeps_that_it_is_taken_for(gpus, precision, d_model, kernel):
    def of(kernel):
        moe = {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 400, "kernel": kernel}
        model = {**TRUNK, "attention_heads": 1, "d_model": d_model, "moe": moe}
        return tiny_spec(model=model, cluster={"gpus_per_worker": gpus}, train={"precision": precision})

    assert assumed_kernel(of("auto")) == kernel
    assert memory(of("auto")) == memory(of(kernel))
    assert may_be_compiled(of("auto")) == (not gpus)


def test_auto_means_the_same_to_a_plan_and_to_a_run():
    assert assumed_kernel(spec_of("llama", "dense")) is None
    assert assumed_kernel(spec_of("llama", "static")) == "capacity"
    assert not may_be_compiled(spec_of("llama", "multi-head", "bfloat16"))  # that names its kernel


def test_activations_of_experts_that_keep_nothing():
    spec = spec_of("subln", "kept")
    moe = spec.model.moe
    fused = spec.model.with_moe(moe.model_copy(update={"kernel": "triton", "recompute": None}))
    hidden = moe.heads * moe.top_k * spec.model.moe_layers * moe.d_expert * 4  # GELU's input
    tokens = spec.train.micro_batch_size * spec.data.seq_len
    saved = memory(spec).activations - memory(spec.model_copy(update={"model": fused})).activations
    assert saved == pytest.approx(tokens * hidden, rel=0.01)


@pytest.mark.parametrize("experts", EXPERTS)
def test_weights_gradients_and_moments_are_those_of_a_trainer(experts):
    spec = spec_of("llama", experts)
    trainer = Trainer(spec, build_mesh(spec.cluster, ["here"], "cpu"), torch.device("cpu"))
    sums = trainer.accumulate(micro_batches(spec, 0))
    parameters = list(trainer.model.parameters())
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    trainer.update(sums)
    states = trainer.strategy.optimizer.state.values()
    moments = sum(s[key].nbytes for s in states for key in ("exp_avg", "exp_avg_sq"))
    found = memory(spec)
    assert found.weights == sum(p.nbytes for p in parameters)
    assert found.gradients == gradients
    assert found.moments == moments


def kept_by_a_rank(spec):
    trainer = trainer_of(spec)
    keep = Kept(trainer.model)
    token_BT = torch.randint(300, (spec.train.micro_batch_size, spec.data.seq_len + 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = trainer.forward(token_BT[:, :-1], Noise(0, 0))
        loss = token_losses(output.logits_BTV, token_BT[:, 1:]).mean() + routing_loss(spec.model, output.routing)
    loss.backward()
    return keep.bytes


def test_activations_of_two_ranks_that_exchange_rows_are_those_they_keep():
    spec = tiny_spec(cluster={"workers": 2, "ep": 2}, data={"seq_len": 64}, train={"micro_batch_size": 4})
    kept = run_ranks(2, kept_by_a_rank, spec)
    # Routing is not uniform, so of the two ranks one keeps more than the other.
    assert memory(spec).activations == pytest.approx(sum(kept) / 2, rel=0.03)


def test_expert_parallelism_spreads_experts_and_nothing_else():
    alone = memory(tiny_spec(cluster={"workers": 1}))
    spread = memory(tiny_spec(cluster={"workers": 4, "ep": 4}))
    experts = 4 * sizes(tiny_spec().model).expert_parameters
    assert alone.weights - spread.weights == experts * 3 // 4
    assert spread.moments == 2 * spread.weights
    assert spread.activations == alone.activations
    assert spread.logits == alone.logits


def held_by_a_rank(spec):
    """Return the bytes that a rank holds of weights, of gradients after a step's last backward, and of moments."""
    trainer = trainer_of(spec)
    sums = trainer.accumulate(micro_batches(spec, 0)[trainer.mesh.rank :: trainer.mesh.world])
    parameters = list(trainer.model.parameters())
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    weights = sum(local(p).nbytes for p in parameters)
    held = sum(g.nbytes for g in gradients)
    trainer.update(sums)
    states = trainer.strategy.optimizer.state.values()
    return weights, held, sum(local(s[key]).nbytes for s in states for key in ("exp_avg", "exp_avg_sq"))


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    ("workers", "ep", "strategy", "shard_experts"),
    [(2, 2, "fsdp", False), (2, 1, "fsdp", True), (2, 2, "zero2", False)],
)
def test_slices_are_those_that_ranks_hold(workers, ep, strategy, shard_experts):
    cluster = {"workers": workers, "ep": ep, "strategy": strategy, "shard_experts": shard_experts}
    spec = tiny_spec(cluster=cluster)
    ranks = run_ranks(workers, held_by_a_rank, spec)
    weights, gradients, moments = (sum(part) / workers for part in zip(*ranks, strict=True))
    found = memory(spec)
    assert found.moments == pytest.approx(moments, rel=0.01)  # slices are padded to whole numbers of values
    if strategy == "fsdp":
        assert found.weights == weights
        assert found.gradients == gradients


def kept_by_a_saver(spec, path):
    """Return the bytes of a saver's buffers after two checkpoints."""
    saver = Saver(RunDir(path), trainer_of(spec), group=1)
    for _ in range(2):
        saver.save(saver._trainer.zero_counts())
        saver.wait()
        saver._group += 1  # as if by another start, for a folder of its own
    return sum(buffer.nbytes for buffer in saver._buffers.values())


@pytest.mark.parametrize(("workers", "ep", "strategy"), [(1, 1, "ddp"), (2, 2, "ddp"), (2, 1, "fsdp"), (2, 2, "zero2")])
def test_the_copy_of_a_checkpoint_is_what_savers_keep(tmp_path, workers, ep, strategy):
    spec, run = new_run(tmp_path, {"workers": workers, "ep": ep, "strategy": strategy})
    kept = run_ranks(workers, kept_by_a_saver, spec, run.path)
    assert checkpoint_copy(spec) * workers == sum(kept)
    assert max(kept) - min(kept) < 300 * 32 * 4  # the largest tensor
    found, gpus = memory(spec), spec.cluster.model_copy(update={"gpus_per_worker": 1})
    assert found.checkpoint_copy == checkpoint_copy(spec)
    assert memory(spec.model_copy(update={"cluster": gpus})).total < found.total


def test_strategies_hold_ever_less():
    of = {
        s: memory(tiny_spec(cluster={"workers": 4, "ep": 1, "strategy": s})) for s in ("ddp", "zero1", "zero2", "zero3")
    }
    # Of weights in float32, ZeRO's slices of its own among them; gradients; and two moments, in whole models of which a
    # slice is a quarter.
    quarters = {"ddp": (4, 4, 8), "zero1": (4 + 1, 4, 2), "zero2": (4 + 1, 1, 2), "zero3": (1 + 1, 1, 2)}
    quarter = sizes(tiny_spec().model).parameters  # of 4 bytes each
    for strategy, expected in quarters.items():
        found = of[strategy]
        assert (found.weights, found.gradients, found.moments) == tuple(n * quarter for n in expected), strategy
    sliced = memory(tiny_spec(cluster={"workers": 4, "ep": 1, "strategy": "fsdp", "shard_experts": True}))
    assert 4 * sliced.weights == of["ddp"].weights
    assert of["zero3"].moments == sliced.moments
    alone = tiny_spec(cluster={"workers": 1, "strategy": "fsdp"})
    assert memory(alone) == memory(tiny_spec(cluster={"workers": 1}))


def peak(spec):
    """Return the most bytes that a forward and backward pass has allocated beside gradients."""
    trainer = trainer_of(spec)
    batch = micro_batches(spec, 0)[trainer.mesh.rank :: trainer.mesh.world][:1]
    trainer.accumulate(batch)  # so that gradients are there
    return peak_bytes(lambda: trainer.accumulate(batch), torch.device("cpu"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("workers", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_the_peak_of_a_large_vocabulary_is_at_its_loss(workers, strategy, precision):
    """The peak has the logits and all that is made of them at once, and nothing of it twice."""
    model = {**TRUNK, "vocab_size": 20_000, "d_model": 16, "d_ff": 32, "moe": None}
    train = {"micro_batch_size": 2, "micro_batches": 2, "precision": precision}
    cluster = {"workers": workers, "strategy": strategy}
    spec = tiny_spec(model=model, data={"seq_len": 256}, train=train, cluster=cluster)
    found = memory(spec)
    for most in run_ranks(workers, peak, spec):
        # Of fsdp's weights that are put together some are there before the loss alone, or after it.
        assert most == pytest.approx(found.activations + found.copies + found.logits, rel=0.03)


@pytest.mark.parametrize(("experts", "ep", "least"), [("dense", 1, 3), ("multi-head", 1, 3), ("multi-head", 2, 1.5)])
def test_recomputing_keeps_inputs_of_blocks_and_one_block(experts, ep, least):
    """Experts on several ranks also keep what is exchanged, which is not sent again."""

    def of(recompute):
        model = {**spec_of("llama", experts).model.model_dump(), "layers": 8, "vocab_size": 50}
        train = {"micro_batch_size": 8, "recompute": recompute}
        spec = tiny_spec(model=model, data={"seq_len": 256}, train=train, cluster={"workers": ep, "ep": ep})
        return memory(spec).activations, sum(run_ranks(ep, peak, spec)) / ep

    whole, most = of(False)
    less, then = of(True)
    assert less < whole / least
    # What a backward has beside what was kept is the same in both, or less.
    assert most - then == pytest.approx(whole - less, rel=0.15)


def whole_on_a_rank(spec):
    """Return the bytes of tensors that FSDP has whole: weights and gradients.

    The weights are those while the last layer's experts compute. The gradients are those after each micro-batch, of
    which none are left after the last.
    """
    trainer = trainer_of(spec)

    def units():
        groups = [m._get_fsdp_state()._fsdp_param_group for m in trainer.model.modules() if isinstance(m, FSDPModule)]
        return [p for group in groups if group for p in group.fsdp_params]

    weights, gradients = [], []

    def gathered(*_):
        weights.append(sum(p._unsharded_param.nbytes for p in units() if p.sharded_state == ShardedState.UNSHARDED))

    trainer.model.moe_layers()[-1].experts.register_forward_pre_hook(gathered)
    backward = trainer.strategy.backward

    def backward_then_look(objective):
        backward(objective)
        kept = [p.unsharded_accumulated_grad for p in units()]
        kept += [p._unsharded_param.grad for p in units() if hasattr(p, "_unsharded_param")]
        gradients.append(sum(g.nbytes for g in kept if g is not None))

    trainer.strategy.backward = backward_then_look
    trainer.accumulate(micro_batches(spec, 0)[trainer.mesh.rank :: trainer.mesh.world])
    return weights[0], gradients


@pytest.mark.parametrize("shard_experts", [False, True])
def test_what_fsdp_puts_together_is_what_a_rank_has_whole(shard_experts):
    """The blocks are all of one width but for their experts; a CPU gathers no block in advance."""
    model = {**tiny_spec().model.model_dump(), "moe": {**EXPERTS["multi-head"], "every": 1}, "d_ff": None}
    spec = tiny_spec(model=model, cluster={"workers": 2, "strategy": "fsdp", "shard_experts": shard_experts})
    found, experts = blocks(spec.model), sizes(spec.model).expert_parameters
    block = 4 * (found.mixture + (experts // 2 if shard_experts else 0))
    slices = memory(spec).gradients - (0 if shard_experts else 4 * experts)
    for weights, gradients in run_ranks(2, whole_on_a_rank, spec):
        assert whole_weights(spec) == weights + block
        assert whole_gradients(spec) == gradients[0] - slices
        assert gradients[-1] == 0
    one = tiny_spec(model=model, cluster=spec.cluster.model_dump(), train={"micro_batches": 2})
    assert whole_gradients(one) == 4 * found.outside + block
    assert memory(one).whole == whole_weights(one) + whole_gradients(one)
    assert memory(tiny_spec(cluster={"workers": 2})).whole == 0
