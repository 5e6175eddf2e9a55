"""Random rows and routes on several ranks, and the comparison of their results with those of one process."""

import gc
import weakref
from typing import NamedTuple

import pytest
import torch

from mhmoe_ray.distributed.build import build_dispatch
from mhmoe_ray.distributed.dispatch.inner_pass import InnerPass
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.model.feedforward import Experts, FeedForward, SharedExpert
from mhmoe_ray.model.moe import dispatch_locally
from mhmoe_ray.model.recompute import recompute_in_backward
from mhmoe_ray.model.router import Routing
from tests.support.specs import tiny_spec

WIDTH, EXPERTS_PER_RANK = 16, 2
LAYOUTS = {"2 nodes of 2": list("aabb"), "4 nodes of 1": list("abcd")}
"""Nodes of the four ranks of a hierarchical dispatch."""


class Case(NamedTuple):
    """Settings of the rows, routes and experts of a dispatch test; each rank has `EXPERTS_PER_RANK` experts."""

    rows: tuple[int, ...] = (11, 7, 9)
    """Number of rows of each rank."""
    used_experts: tuple[int, ...] = ()
    """Experts that routes go to; by default all. If `is_local`, r * EXPERTS_PER_RANK is added to the ids on rank r."""
    is_local: bool = False
    dropped: float = 0.0
    """Share of routes that are dropped."""
    top_k: int = 2
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    model: tuple[tuple[str, object], ...] = ()
    kernel: str = "auto"
    recompute: float = 0.0
    has_shared_expert: bool = False
    """Whether a shared expert also computes the rows; its outputs are added to those of the routed experts."""

    @property
    def experts(self) -> int:
        return EXPERTS_PER_RANK * len(self.rows)


def build_spec(case):
    """Return the spec of the model whose experts a case has."""
    moe = {"heads": 1, "experts": case.experts, "top_k": 1, "d_expert": 24}
    model = {**tiny_spec().model.model_dump(), "d_model": WIDTH, "moe": moe, **dict(case.model)}
    return tiny_spec(model=model).model


def dispatch_of(dispatch, nodes):
    """Return the "flat" or "hierarchical" dispatch of one expert-parallel group; `nodes` has the node of each rank."""
    spec = tiny_spec(cluster={"workers": len(nodes), "ep": len(nodes), "dispatch": dispatch}).cluster
    return build_dispatch(spec, build_mesh(spec, nodes, "cpu"))


def build_shared_layer(case):
    """Return the shared expert of a case, the same on every rank."""
    generator = torch.Generator().manual_seed(6)
    layer = FeedForward(build_spec(case), 20).double()
    for p in layer.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 4)
    return layer.to(case.dtype)


def build_problem(case, expert_ids, only_rank=None):
    """Return the experts `expert_ids`, and the rows, expert ids, gates, mask of kept routes and gradients of outputs.

    Rows are those of rank `only_rank`, or of all ranks in order if it is None. All values are drawn in float64, and
    experts and rows are then rounded to the dtype of the case.
    """
    g = torch.Generator().manual_seed(5)
    experts = Experts(build_spec(case), expert_ids).double()
    for p in experts.parameters():
        full_tensor = torch.randn(case.experts, *p.shape[1:], generator=g, dtype=torch.float64) / 4
        p.data.copy_(full_tensor[expert_ids.start : expert_ids.stop])
    experts.recompute, experts.kernel = case.recompute, case.kernel
    parts = []
    for rank, n in enumerate(case.rows):
        used_E = torch.tensor(case.used_experts or range(case.experts)) + (
            rank * EXPERTS_PER_RANK if case.is_local else 0
        )
        expert_NK = used_E[torch.rand(n, len(used_E), generator=g).topk(case.top_k).indices]
        gate_NK = torch.rand(n, case.top_k, generator=g, dtype=torch.float64) + 0.1
        kept_NK = torch.rand(n, case.top_k, generator=g) >= case.dropped
        x_ND, dy_ND = torch.randn(2, n, WIDTH, generator=g, dtype=torch.float64)
        if only_rank in (None, rank):
            parts.append((x_ND, expert_NK, gate_NK, kept_NK, dy_ND))
    x_ND, *routes, dy_ND = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return experts.to(case.dtype), x_ND.to(case.dtype), *routes, dy_ND


def outputs_and_gradients(case, dispatch, experts, x_ND, expert_NK, gate_NK, kept_NK, dy_ND):
    """Return the outputs of a dispatch and their gradients as one list, and the routing.

    The gradients are those of rows, gates, expert weights and, if there is a shared expert, its weights.
    """
    x_ND, gate_NK = (t.requires_grad_() for t in (x_ND, gate_NK.to(torch.promote_types(case.dtype, torch.float32))))
    count_E = torch.bincount(expert_NK[kept_NK], minlength=case.experts)
    routing = Routing(expert_NK, gate_NK * kept_NK, *[torch.zeros(())] * 2, count_E, torch.zeros(()), None)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        shared_layer = build_shared_layer(case) if case.has_shared_expert else None
        shared = None if shared_layer is None else SharedExpert(shared_layer, x_ND)
        y_ND, y_shared_ND = dispatch(x_ND, routing, experts, shared)
    y_ND = y_ND if y_shared_ND is None else y_ND + y_shared_ND
    shared_parameters = [] if shared_layer is None else shared_layer.parameters()
    inputs = (x_ND, gate_NK, *experts.parameters(), *shared_parameters)
    gradients = torch.autograd.grad(y_ND, inputs, dy_ND.to(y_ND.dtype), materialize_grads=True)
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
    return [y_ND.detach(), *gradients], routing


def assert_equal_to_one_process(case, ranks):
    """Assert that the ranks' outputs and gradients together equal those of one process in float64, up to rounding.

    `ranks` has the list of outputs and gradients of each rank.
    """
    exact_case = case._replace(dtype=torch.float64, autocast=False, kernel="auto")
    expected, _ = outputs_and_gradients(exact_case, dispatch_locally, *build_problem(exact_case, range(case.experts)))
    assert all(tensors[0].dtype == (torch.bfloat16 if case.autocast else case.dtype) for tensors in ranks)
    for i, oracle in enumerate(expected):
        parts = [tensors[i] for tensors in ranks]
        is_shared = case.has_shared_expert and i >= len(expected) - len(list(build_shared_layer(case).parameters()))
        output = sum(parts) if is_shared else torch.cat(parts)
        assert output.shape == oracle.shape
        rounding = 0.05 if case.autocast else {torch.float64: 1e-12, torch.float32: 1e-6}.get(case.dtype, 0.05)
        assert (output - oracle).norm() <= rounding * oracle.norm(), ("y", "dx", "dgate", *["weights"] * 15)[i]


class LivingObjects(NamedTuple):
    """Numbers of passes and of their outputs that still live after the steps that made them."""

    outputs: int
    """Outputs that only reference counts may have freed."""
    passes: int
    """Passes after a run of Python's garbage collector, which frees no cycle through C++."""
    all_passes: int
    """Number of passes that were made."""


def count_living_after_recomputation(dispatch, x_ND, routing, experts, steps):
    """Return what outlives some steps of a recomputed dispatch with a shared expert."""
    layer = build_shared_layer(Case(model=(("backbone", "subln"),))).to(x_ND.dtype)
    # The gates are detached, because an earlier backward has freed their graph.
    routing = routing._replace(gate_NK=routing.gate_NK.detach())
    outputs, passes = [], []

    def compute(x_ND):
        return sum(dispatch(x_ND, routing, experts, SharedExpert(layer, x_ND)))

    def forward_and_record(inner_pass, x, forward=InnerPass.forward):
        y = forward(inner_pass, x)
        outputs.append(weakref.ref(y))
        passes.append(weakref.ref(inner_pass))
        return y

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InnerPass, "forward", forward_and_record)
            for _ in range(steps):
                recompute_in_backward(compute, x_ND).sum().backward()
        living_outputs = sum(output() is not None for output in outputs)
    finally:
        gc.enable()
    gc.collect()
    return LivingObjects(living_outputs, sum(reference() is not None for reference in passes), len(passes))
