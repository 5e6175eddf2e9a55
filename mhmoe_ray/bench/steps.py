"""Whole training steps of a plain mixture of experts and of the multi-head ones that P2 would put beside it.

P1 is the first paper (arXiv 2404.15045), P2 the follow-up paper. The multi-head models have h sub-tokens with k = h,
and equal multiply-adds and parameters. At half of P2's width the solver finds P2's own numbers of experts, 40 for h 2
and 96 for h 3, at half their width.

A step is that of training: M micro-batches forward, loss and backward, then clipping and AdamW.

P1's own figures of speed stand here too: whole models, trained on 8 RTX 3090 cards. They are from the authors' answers
in the review of P1. Its h and sizes are not stated.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mhmoe_ray.bench.measure import Figures
from mhmoe_ray.bench.timing import Hardware, clock, interleaved
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.planner.match import matched_heads
from mhmoe_ray.planner.presets import FAMILIES, Size
from mhmoe_ray.planner.sizes import sizes
from mhmoe_ray.spec import DataSpec, ModelSpec, RunSpec, SourceSpec, TrainSpec
from mhmoe_ray.train.step import MicroBatch, Trainer

SMALL = Size(384, 4, 8192, 256, steps=1000, micro_batches=2, micro_batch_size=8, precision="bfloat16")
"""Size at which a step takes about a second on two CPU cores.

384 is the width nearest to the families' `small` that splits in 2 and in 3.
"""


class StepFigures(NamedTuple):
    """Measurements of the training steps of one model."""

    name: str
    spec: RunSpec
    seconds: list[float]
    """Seconds of a step, one value per round."""
    median: float
    to_smoe: float
    """Ratio of the median time to that of the plain model."""
    paper: float
    """The same ratio from the first paper's own throughput with dynamic routing, whatever its h was."""

    @property
    def tokens_a_second(self) -> float:
        return self.spec.tokens_per_step / self.median

    @property
    def parameters(self) -> int:
        return sizes(self.spec.model).parameters

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "moe": self.spec.model.model_dump(mode="json")["moe"],
            "parameters": self.parameters,
            "seconds": self.seconds,
            "median": self.median,
            "tokens_a_second": self.tokens_a_second,
            "to_smoe": self.to_smoe,
            "papers_ratio": self.paper,
        }


class Case:
    """A model in training, with the micro-batches of a step in place."""

    def __init__(self, spec: RunSpec, device: torch.device) -> None:
        self.spec = spec
        self.trainer = Trainer(spec, build_mesh(spec.cluster, ["here"], device.type), device)
        shape = (spec.train.micro_batches, spec.train.micro_batch_size, spec.data.seq_len + 1)
        token_MBT = torch.randint(spec.model.vocab_size, shape, generator=torch.Generator().manual_seed(spec.seed))
        counts_BT = torch.ones(token_MBT[0, :, 1:].shape, dtype=torch.bool, device=device)
        self.batches = [MicroBatch(token_BT, counts_BT) for token_BT in token_MBT.to(device)]

    def step(self) -> float:
        """Run one training step, and return its mean loss in nats per token."""
        sums = self.trainer.accumulate(self.batches)
        self.trainer.update(sums)
        return sums.loss / sums.targets


def measure(size: Size, heads: Sequence[int], rounds: int, hardware: Hardware) -> list[StepFigures]:
    """Measure steps of all models in interleaved rounds, the plain model first.

    Raises:
        SpecError: in the same cases as `matched_models`.
    """
    specs = matched_models(size, heads)
    cases: dict[str, Callable[[], object]] = {n: Case(spec, hardware.device).step for n, spec in specs.items()}
    found = interleaved(cases, rounds, clock(hardware.device))
    plain = found["SMoE"].median
    return [
        StepFigures(
            name,
            specs[name],
            timing.seconds,
            timing.median,
            timing.median / plain,
            time_ratio("SMoE" if name == "SMoE" else "MH-MoE", "dynamic"),
        )
        for name, timing in found.items()
    ]


def matched_models(size: Size, heads: Sequence[int]) -> dict[str, RunSpec]:
    """Return the specs of the plain model and of the multi-head models that match it, by name, the plain one first.

    Args:
        size: the size of all of them.
        heads: the numbers of heads h of the multi-head models.

    Raises:
        SpecError: the width does not split into so many heads, or no model with so many heads matches.
    """
    trunk = size.trunk
    plain = ModelSpec.model_validate({**trunk, "moe": (FAMILIES["smoe"].moe or dict)(trunk)})
    models = {"SMoE": plain}
    models |= {f"MH-MoE h {h}": matched_heads(plain, h) for h in heads}
    return {name: _run(model, size) for name, model in models.items()}


def _run(model: ModelSpec, size: Size) -> RunSpec:
    """Return the spec of a run whose text is never read, because the time of a step does not depend on its tokens."""
    data = DataSpec(sources={"none": SourceSpec(path="none")}, prepared="none", seq_len=size.seq_len)
    return RunSpec(name="bench", model=model, data=data, train=TrainSpec(**size.train))


TOKENS_A_SECOND = {
    ("SMoE", "static"): 32.21,
    ("SMoE", "dynamic"): 33.98,
    ("MH-MoE", "static"): 25.77,
    ("MH-MoE", "dynamic"): 31.93,
}


def time_ratio(model: str, routing: str) -> float:
    """Return the ratio of the time per token of a model in the first paper to that of its dynamic SMoE."""
    return TOKENS_A_SECOND["SMoE", "dynamic"] / TOKENS_A_SECOND[model, routing]


class Beside(NamedTuple):
    layer: str
    """Name of our layer."""
    paper: str
    """Name of the paper's model."""
    tokens_a_second: float
    papers_ratio: float
    """Ratio of its time per token to that of the paper's dynamic SMoE."""
    our_ratio: float
    """Ratio of our layer's time to that of our plain layer."""


def beside(figures: Sequence[Figures]) -> list[Beside]:
    """Return our plain and multi-head layers, static and dropless, beside the paper's models."""
    [plain] = (f.median for f in figures[1:2])
    rows = []
    for f in figures:
        kind = next((kind for kind in ("SMoE", "MH-MoE") if f.name.startswith(kind)), None)
        if kind is None or f.moe is None:
            continue
        routing = "dynamic" if f.moe.capacity_factor is None else "static"
        found = TOKENS_A_SECOND[kind, routing]
        rows.append(Beside(f.name, f"{kind} {routing}", found, time_ratio(kind, routing), f.median / plain))
    return rows
