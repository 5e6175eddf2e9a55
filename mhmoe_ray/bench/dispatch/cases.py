"""Layers of equal cost, routes drawn for them, the bytes these routes must send between nodes, and a slow link.

The link joins two network namespaces on one machine: it is a pair of virtual interfaces that `tc` shapes.

Processes of one namespace talk to each other over its own address. The kernel routes that address over loopback, so
this traffic crosses no link, although gloo knows of the slow interface only.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_ray.bench.steps import SMALL, matched_models
from mhmoe_ray.errors import JobError, SpecError
from mhmoe_ray.spec import ClusterSpec, ModelSpec

INTERFACE = "slow"
"""Name of the slow interface in both namespaces."""


class Namespace(NamedTuple):
    name: str

    @property
    def command(self) -> list[str]:
        """Prefix of a command that is to run in this namespace."""
        return ["ip", "netns", "exec", self.name]


@contextmanager
def slow_link(rate: str) -> Iterator[tuple[Namespace, Namespace]]:
    """Yield two network namespaces with a slow link between them, which are removed at the end of the block.

    They are also removed on Ctrl-C, SIGTERM and SIGHUP.

    Args:
        rate: the bandwidth each way, as `tc` writes it: 200mbit, 1gbit.

    Raises:
        SpecError: `rate` is not a rate, or this machine or user cannot have such a link.
        JobError: the kernel refuses to create the link.
    """
    if not re.fullmatch(r"\d+(\.\d+)?[kmg]bit", rate):
        raise SpecError(f"--slow-link {rate}", "it is not a rate", "write one like 200mbit or 1gbit")
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        fix = "install iproute2, on Linux, or leave the option out"
        raise SpecError("--slow-link", f"network namespaces need {' and '.join(missing)}", fix)
    if os.geteuid() != 0:
        raise SpecError("--slow-link", "network namespaces need root", "run it as root, or leave the option out")
    ends = Namespace(f"mhmoe-{os.getpid()}-a"), Namespace(f"mhmoe-{os.getpid()}-b")
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for end in ends:
            _run("ip", "netns", "add", end.name)
        a, b = (end.name for end in ends)
        _run(*f"ip link add {INTERFACE} netns {a} type veth peer name {INTERFACE} netns {b}".split())
        for i, end in enumerate(ends):
            _run(*f"ip -n {end.name} address add 10.231.77.{i + 1}/30 dev {INTERFACE}".split())
            for interface in ("lo", INTERFACE):
                _run(*f"ip -n {end.name} link set {interface} up".split())
            # Room for some packets as large as the kernel makes them, and for what comes in a few of its ticks.
            shape = f"tbf rate {rate} burst 256k latency 200ms"
            _run(*f"tc -n {end.name} qdisc add dev {INTERFACE} root {shape}".split())
        yield ends
    finally:
        for end in ends:
            # Not of the terminal's group, whose Ctrl-C would end it too; one that was not made yet is none to remove.
            if Path("/run/netns", end.name).exists():
                subprocess.run(["ip", "netns", "delete", end.name], check=True, start_new_session=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def crossed() -> int:
    """Return the bytes that have crossed the link both ways so far, with all headers.

    Call it in one of the link's namespaces.
    """
    statistics = Path("/sys/class/net", INTERFACE, "statistics")
    return sum(int((statistics / f"{way}_bytes").read_text()) for way in ("rx", "tx"))


def _end(number: int, _: object) -> None:
    sys.exit(128 + number)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = f"`{' '.join(command)}` said {done.stderr.strip().partition(chr(10))[0]}"
        raise JobError("slow link", why, "leave --slow-link out, or run it where the kernel has network shaping")


NODES = ("a", "a", "b", "b")
"""Node of each rank."""
DISPATCHES = ("flat", "hierarchical")
ROW_VALUE = 2  # bytes of bfloat16
GATE, ID, COUNT = 4, 4, 8  # bytes of a gate in float32, of an expert's number and of a count as they travel


def layers() -> dict[str, ModelSpec]:
    """Return the models to compare, by name.

    They are plain layers of the same multiply-adds and parameters with ever finer experts, and the multi-head layers
    that the follow-up paper would put beside them, at half its width.
    """
    models = {name: spec.model for name, spec in matched_models(SMALL, [2, 3]).items()}
    plain = models.pop("SMoE")
    assert plain.moe is not None
    found = {"SMoE": plain}
    for times in (2, 8):
        shape = {"experts": 8 * times, "top_k": times, "d_expert": plain.moe.d_expert // times}
        found[f"fine-grained x {times}"] = plain.with_moe(plain.moe.model_copy(update=shape))
    return found | models


def spread(dispatch: str) -> ClusterSpec:
    """Return the layout of one expert-parallel group over both nodes."""
    return ClusterSpec.model_validate({"workers": len(NODES), "ep": len(NODES), "dispatch": dispatch})


class Routes(NamedTuple):
    """Routes of one rank's rows, to experts that are drawn uniformly."""

    expert_NK: Tensor
    gate_NK: Tensor

    @staticmethod
    def draw(model: ModelSpec, tokens: int, rank: int) -> "Routes":
        moe = model.moe
        assert moe is not None
        g = torch.Generator().manual_seed(rank)
        score, expert_NK = torch.rand(tokens * moe.heads, moe.experts, generator=g).topk(moe.top_k)
        return Routes(expert_NK, score.softmax(-1))


class Expected(NamedTuple):
    """Expected bytes from node to node in a forward and backward pass, summed over all ranks and both directions."""

    flat: int
    hierarchical: int


def expected(model: ModelSpec, tokens: int) -> Expected:
    """Compute the bytes between nodes from the routes alone: rows, outputs, and the gradients of both.

    Flat dispatch sends each of them once per route to an expert on another node. Hierarchical dispatch sends each of
    them once per other node, and adds the gates in both directions and the expert ids.
    """
    moe = model.moe
    assert moe is not None
    ranks, k = len(NODES), moe.top_k
    routes = rows = 0
    for rank, node in enumerate(NODES):
        owner_NK = Routes.draw(model, tokens, rank).expert_NK // (moe.experts // ranks)
        elsewhere_NK = torch.tensor([other != node for other in NODES])[owner_NK]
        routes += int(elsewhere_NK.sum())
        rows += int(elsewhere_NK.any(1).sum())  # there is one other node
    row = 4 * ROW_VALUE * model.d_model // moe.heads
    pairs = sum(a != b for a in NODES for b in NODES)  # of ranks that are on different nodes
    return Expected(
        routes * row + pairs * moe.experts // ranks * COUNT,
        rows * (row + k * (2 * GATE + ID)) + ranks * 2 * COUNT,
    )
