"""Whole training steps of a plain mixture of experts and of multi-head models of equal work.

P1 is arXiv 2404.15045, and P2 is arXiv 2411.16205. As in P2, the multi-head models have h sub-tokens with k = h experts
each, and the multiply-adds and parameters of the plain model. At half of P2's width, `planner/match.py` finds P2's
numbers of experts, 40 for h = 2 and 96 for h = 3. A step has the forward, loss and backward of M micro-batches, then
clipping and AdamW. `PAPER_TOKENS_PER_SECOND` has P1's throughput of whole models on 8 RTX 3090 cards, from its authors'
answers in the public review, which state neither h nor the sizes of the models.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mhmoe_ray.bench.measure import LayerFigures
from mhmoe_ray.bench.timing import Hardware, device_clock, time_interleaved
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.model.attention import document_offsets
from mhmoe_ray.planner.match import matched_heads
from mhmoe_ray.planner.presets import FAMILIES, Size
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import ClusterSpec, DataSpec, ModelSpec, RunSpec, SourceSpec, TrainSpec
from mhmoe_ray.train.objectives import MicroBatch
from mhmoe_ray.train.step import Trainer

SMALL_SIZE = Size(384, 4, 8192, 256, steps=1000, micro_batches=2, micro_batch_size=8, precision="bfloat16")
"""Size at which a step takes about a second on two CPU cores; its width, half of P2's, is divisible by 2 and 3."""


class StepFigures(NamedTuple):
    """Measurements of the training steps of one model; `seconds` has one value per round."""

    name: str
    spec: RunSpec
    seconds: list[float]
    median: float
    ratio_to_smoe: float
    """Ratio of the median time to that of the plain model."""
    paper_ratio: float
    """Time per token of this kind of model (SMoE or MH-MoE) in P1, divided by that of its SMoE, with dynamic
    routing."""

    @property
    def tokens_per_second(self) -> float:
        return self.spec.tokens_per_step / self.median

    @property
    def parameters(self) -> int:
        return compute_sizes(self.spec.model).parameters

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "moe": self.spec.model.model_dump(mode="json")["moe"],
            "parameters": self.parameters,
            "seconds": self.seconds,
            "median": self.median,
            "tokens_a_second": self.tokens_per_second,
            "to_smoe": self.ratio_to_smoe,
            "papers_ratio": self.paper_ratio,
        }


class StepCase:
    """Model in training, with this rank's micro-batches of a step on the device."""

    def __init__(self, spec: RunSpec, device: torch.device) -> None:
        self.spec = spec
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        mesh = build_mesh(spec.cluster, rank_nodes(spec.cluster, world_size), device.type)
        self.trainer = Trainer(spec, mesh, device)
        shape = (spec.train.micro_batches, spec.train.micro_batch_size, spec.data.seq_len + 1)
        token_MBT = torch.randint(spec.model.vocab_size, shape, generator=torch.Generator().manual_seed(spec.seed))
        # Random tokens have no padding, so all targets count.
        counts_BT = torch.ones(token_MBT[0, :, 1:].shape, dtype=torch.bool, device=device)
        self.batches = [
            self._micro_batch(token_BT, counts_BT, device) for token_BT in token_MBT[mesh.rank :: world_size]
        ]

    def _micro_batch(self, token_BT: torch.Tensor, counts_BT: torch.Tensor, device: torch.device) -> MicroBatch:
        """Return a micro-batch on the device. If the model has document masks, token 0 begins a document."""
        if not self.spec.model.document_masks:
            return MicroBatch(token_BT.to(device), counts_BT)
        starts_BT = token_BT[:, :-1] == 0
        offset_N1 = document_offsets(starts_BT).to(device) if device.type == "cuda" else None
        return MicroBatch(token_BT.to(device), counts_BT, starts_BT.to(device), None, offset_N1)

    def step(self) -> float:
        """Run one training step, and return this rank's part of the mean loss in nats per token."""
        sums = self.trainer.accumulate(self.batches)
        self.trainer.update(sums)
        return sums.loss / sums.targets


def rank_nodes(cluster: ClusterSpec, world_size: int | None = None) -> list[str]:
    """Return the names of the ranks' nodes: one for all or, with hierarchical dispatch, which needs several, one each.

    `world_size` is by default the largest one.
    """
    count = world_size or cluster.max_world_size
    return [f"node {rank}" for rank in range(count)] if cluster.dispatch == "hierarchical" else ["here"] * count


def measure(
    size: Size, heads: Sequence[int], rounds: int, hardware: Hardware, compiled: bool = False
) -> list[StepFigures]:
    """Measure training steps of the plain model, which is first, and of multi-head models, in interleaved rounds.

    `compiled` adds each model with `train.compile`. The errors are those of `matched_models`.
    """
    specs = matched_models(size, heads)
    if compiled:
        # All models share the code of their blocks. By default torch compiles it for eight different sizes at most, and
        # runs the blocks of further models without compilation.
        torch._dynamo.config.recompile_limit = 4 * len(specs)
        specs |= {f"{name}, compiled": _compiled(spec) for name, spec in specs.items()}
    cases: dict[str, Callable[[], object]] = {n: StepCase(spec, hardware.device).step for n, spec in specs.items()}
    timings = time_interleaved(cases, rounds, device_clock(hardware.device))
    plain_median = timings["SMoE"].median
    return [
        StepFigures(
            name,
            specs[name],
            timing.seconds,
            timing.median,
            timing.median / plain_median,
            time_ratio("SMoE" if name.startswith("SMoE") else "MH-MoE", "dynamic"),
        )
        for name, timing in timings.items()
    ]


def _compiled(spec: RunSpec) -> RunSpec:
    return spec.model_copy(update={"train": spec.train.model_copy(update={"compile": True})})


def matched_models(size: Size, heads: Sequence[int]) -> dict[str, RunSpec]:
    """Return the specs of the plain model, which is first, and of multi-head models of equal work, by name.

    A number of heads that does not divide the width or allows no equal work and parameters raises a SpecError.
    """
    trunk = size.trunk
    plain = ModelSpec.model_validate({**trunk, "moe": (FAMILIES["smoe"].moe or dict)(trunk)})
    models = {"SMoE": plain}
    models |= {f"MH-MoE h {h}": matched_heads(plain, h) for h in heads}
    return {name: _run_spec(model, size) for name, model in models.items()}


def _run_spec(model: ModelSpec, size: Size) -> RunSpec:
    # A spec must name a source and a prepared folder, but nothing reads them: `StepCase` draws random tokens, because
    # the time of a step does not depend on its tokens.
    data = DataSpec(sources={"none": SourceSpec(path="none")}, prepared="none", seq_len=size.seq_len)
    return RunSpec(name="bench", model=model, data=data, train=TrainSpec(**size.train))


PAPER_TOKENS_PER_SECOND = {
    ("SMoE", "static"): 32.21,
    ("SMoE", "dynamic"): 33.98,
    ("MH-MoE", "static"): 25.77,
    ("MH-MoE", "dynamic"): 31.93,
}


def time_ratio(model: str, routing: str) -> float:
    """Return a model's time per token in P1, divided by that of P1's SMoE with dynamic routing."""
    return PAPER_TOKENS_PER_SECOND["SMoE", "dynamic"] / PAPER_TOKENS_PER_SECOND[model, routing]


class PaperComparison(NamedTuple):
    """Times of one of our layers and of a model of P1, each relative to a plain SMoE."""

    layer: str
    paper: str
    tokens_a_second: float
    papers_ratio: float
    our_ratio: float


def compare_with_paper(figures: Sequence[LayerFigures]) -> list[PaperComparison]:
    """Return comparisons of our plain and multi-head layers, static and dropless, with P1's models.

    `figures` begin with those of the dense layer and of the plain mixture of experts.
    """
    [plain_median] = (f.median for f in figures[1:2])
    rows = []
    for f in figures:
        kind = next((kind for kind in ("SMoE", "MH-MoE") if f.name.startswith(kind)), None)
        if kind is None or f.moe is None:
            continue
        routing = "dynamic" if f.moe.capacity_factor is None else "static"
        paper_rate = PAPER_TOKENS_PER_SECOND[kind, routing]
        rows.append(
            PaperComparison(f.name, f"{kind} {routing}", paper_rate, time_ratio(kind, routing), f.median / plain_median)
        )
    return rows
