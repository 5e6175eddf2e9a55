"""Program of each of the four ranks: it runs all layers with flat and hierarchical dispatch in interleaved rounds."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mhmoe_ray.bench.timing import measure_rounds
from mhmoe_ray.distributed.build import build_dispatch
from mhmoe_ray.distributed.mesh import Mesh, build_mesh
from mhmoe_ray.model.feedforward import Dispatch, Experts
from mhmoe_ray.model.router import Routing
from mhmoe_ray.spec import ModelSpec
from tests.benchmarks.dispatch.cases import DISPATCHES, NODES, Routes, cluster_spec, layer_models
from tests.benchmarks.dispatch.link import link_bytes


class Case:
    """Experts of a layer and routed rows on this rank, for repeated passes through any dispatch."""

    def __init__(self, model: ModelSpec, tokens: int, mesh: Mesh) -> None:
        assert model.moe is not None
        routes, zero = Routes.draw(model, tokens, mesh.rank), torch.zeros(())
        self.experts = Experts(model, mesh.expert_ids(model.moe.experts)).to(torch.bfloat16)
        for p in self.experts.parameters():
            torch.nn.init.normal_(p, std=0.02)
        self.gate_NK = routes.gate_NK.requires_grad_()
        self.routing = Routing(routes.expert_NK, self.gate_NK, zero, zero, zero, zero, None)
        self.x_ND = torch.randn(len(routes.expert_NK), model.row_width, dtype=torch.bfloat16).requires_grad_()

    def run(self, dispatch: Dispatch) -> None:
        """Run a forward and backward pass, and drop the gradients of rows, gates and weights."""
        y_ND, _ = dispatch(self.x_ND, self.routing, self.experts, None)
        torch.autograd.backward(y_ND, torch.ones_like(y_ND))
        for leaf in (self.x_ND, self.gate_NK, *self.experts.parameters()):
            leaf.grad = None


def measure(tokens: int, rounds: int, link: bool) -> dict[str, Any]:
    """Measure each layer with each dispatch, together with the other ranks; each rank has `tokens` tokens.

    The seconds of a round end when the last rank has finished. `counted` are the bytes that all ranks send between
    nodes in a pass, as the dispatch counts them. `over_link` has the bytes that crossed the link in each round, if
    there is one.
    """
    mesh = build_mesh(cluster_spec("flat"), NODES, "cpu")
    dispatches = {name: build_dispatch(cluster_spec(name), mesh) for name in DISPATCHES}
    results: dict[str, Any] = {}
    for layer, model in layer_models().items():
        case = Case(model, tokens, mesh)

        def measure_pass(name: str, _: int, case: Case = case) -> tuple[float, int, int]:
            """Return the seconds of a pass, the bytes that this rank sends to the other node, and those of the link."""
            dispatch = dispatches[name]
            assert dispatch is not None
            previous_link_bytes = link_bytes() if link else 0
            # `_synchronized_time` waits for all ranks, so that no rank sends before all ranks have read the byte
            # counter of the link.
            start_time = _synchronized_time()
            case.run(dispatch)
            end_time = _synchronized_time()
            sent_bytes = dispatch.pop_sent_bytes().between_nodes
            return end_time - start_time, sent_bytes, link_bytes() - previous_link_bytes if link else 0

        passes = measure_rounds(DISPATCHES, rounds, measure_pass, warm_up=True)
        total = torch.tensor([passes[name][-1][1] for name in DISPATCHES])
        dist.all_reduce(total)
        results[layer] = {
            name: {
                "seconds": [seconds for seconds, _, _ in passes[name]],
                "counted": counted_bytes,
                "over_link": [crossed_bytes for _, _, crossed_bytes in passes[name]] if link else [],
            }
            for name, counted_bytes in zip(DISPATCHES, total.tolist(), strict=True)
        }
    return results


def _synchronized_time() -> float:
    dist.barrier()
    return time.perf_counter()


def main() -> None:
    """Join the process group, measure both dispatches, and print the results as JSON on rank 0.

    The program's argument is a JSON object with the settings.
    """
    request = json.loads(sys.argv[1])
    # Each of the four ranks uses a single thread, because all of them share the CPUs of this machine.
    torch.set_num_threads(1)
    rank, folder = int(os.environ["RANK"]), Path(request["folder"])
    # The ranks find each other through a file, because a network store would send bytes over the link whose bytes are
    # counted.
    dist.init_process_group("gloo", f"file://{folder / 'store'}", world_size=len(NODES), rank=rank)
    figures = measure(request["tokens"], request["rounds"], request["link"])
    if rank == 0:
        print(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
