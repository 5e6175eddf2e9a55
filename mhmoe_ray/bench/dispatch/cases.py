"""Layers of equal cost, random routes, the bytes that they send between nodes, and a slow link.

The link joins two network namespaces by a pair of virtual interfaces that `tc` shapes. Processes in a namespace
communicate through the address of its slow interface, the only one that gloo uses. Linux routes this address over
loopback, so their traffic does not cross the link.
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

from mhmoe_ray.bench.steps import SMALL_SIZE, matched_models
from mhmoe_ray.errors import JobError, SpecError
from mhmoe_ray.spec import ClusterSpec, ModelSpec

INTERFACE = "slow"
"""Name of the slow interface in both namespaces."""


class Namespace(NamedTuple):
    """Network namespace of Linux, in which the processes of one simulated node run."""

    name: str

    @property
    def command(self) -> list[str]:
        """Prefix of a command that is to run in this namespace."""
        return ["ip", "netns", "exec", self.name]


@contextmanager
def slow_link(rate: str) -> Iterator[tuple[Namespace, Namespace]]:
    """Yield two network namespaces with a slow link between them, and remove them at the end of the block.

    They are also removed on Ctrl-C, SIGTERM and SIGHUP. `rate` is the bandwidth in each direction as `tc` writes it,
    such as 200mbit. A malformed rate, or a machine or user that cannot create such a link, is a SpecError. A refusal by
    Linux is a JobError.
    """
    if not re.fullmatch(r"\d+(\.\d+)?[kmg]bit", rate):
        raise SpecError(f"--slow-link {rate}", "it is not a rate", "write one like 200mbit or 1gbit")
    if missing_tools := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        fix = "install iproute2, on Linux, or leave the option out"
        raise SpecError("--slow-link", f"network namespaces need {' and '.join(missing_tools)}", fix)
    if os.geteuid() != 0:
        raise SpecError("--slow-link", "network namespaces need root", "run it as root, or leave the option out")
    namespaces = Namespace(f"mhmoe-{os.getpid()}-a"), Namespace(f"mhmoe-{os.getpid()}-b")
    previous_handlers = {number: signal.signal(number, _exit_on_signal) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for namespace in namespaces:
            _run_command("ip", "netns", "add", namespace.name)
        a, b = (end.name for end in namespaces)
        _run_command(*f"ip link add {INTERFACE} netns {a} type veth peer name {INTERFACE} netns {b}".split())
        for i, namespace in enumerate(namespaces):
            _run_command(*f"ip -n {namespace.name} address add 10.231.77.{i + 1}/30 dev {INTERFACE}".split())
            for interface in ("lo", INTERFACE):
                _run_command(*f"ip -n {namespace.name} link set {interface} up".split())
            # The burst is the number of bytes that `tbf` sends at once. It must hold several of the largest packets
            # of Linux and the bytes of a few timer ticks, because otherwise the link would not reach its rate.
            shape = f"tbf rate {rate} burst 256k latency 200ms"
            _run_command(*f"tc -n {namespace.name} qdisc add dev {INTERFACE} root {shape}".split())
        yield namespaces
    finally:
        for namespace in namespaces:
            # `ip` runs in a session of its own, so that Ctrl-C in the terminal does not interrupt the removal. A
            # namespace is missing if a command above failed before it was created.
            if Path("/run/netns", namespace.name).exists():
                subprocess.run(["ip", "netns", "delete", namespace.name], check=True, start_new_session=True)
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def link_bytes() -> int:
    """Return the bytes that have crossed the link of this namespace so far, in both directions and with all headers."""
    statistics = Path("/sys/class/net", INTERFACE, "statistics")
    return sum(int((statistics / f"{direction}_bytes").read_text()) for direction in ("rx", "tx"))


def _exit_on_signal(number: int, _: object) -> None:
    # By default SIGTERM and SIGHUP end the process without running the `finally` of `slow_link`. SystemExit runs it, so
    # that the network namespaces are removed.
    sys.exit(128 + number)


def _run_command(*command: str) -> None:
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        reason = f"`{' '.join(command)}` failed: {process.stderr.strip().partition(chr(10))[0]}"
        raise JobError("slow link", reason, "leave --slow-link out, or run it where the kernel has network shaping")


NODES = ("a", "a", "b", "b")
"""Name of the simulated node of each rank."""
DISPATCHES = ("flat", "hierarchical")
# Bytes of one value of a row, which is sent in bfloat16.
VALUE_BYTES = 2
# Bytes of one gate (float32), one expert id (int32) and one count (int64).
GATE_BYTES, ID_BYTES, COUNT_BYTES = 4, 4, 8


def layer_models() -> dict[str, ModelSpec]:
    """Return the models to compare by name, all with the same multiply-adds and parameters.

    They are plain layers with finer and finer experts, and the multi-head layers with which arXiv 2411.16205 would
    compare them, at half the width of that paper's models.
    """
    models = {name: spec.model for name, spec in matched_models(SMALL_SIZE, [2, 3]).items()}
    plain_model = models.pop("SMoE")
    assert plain_model.moe is not None
    plain_models = {"SMoE": plain_model}
    for factor in (2, 8):
        shape = {"experts": 8 * factor, "top_k": factor, "d_expert": plain_model.moe.d_expert // factor}
        plain_models[f"fine-grained x {factor}"] = plain_model.with_moe(plain_model.moe.model_copy(update=shape))
    return plain_models | models


def cluster_spec(dispatch: str) -> ClusterSpec:
    """Return the spec of a cluster with one expert-parallel group over both nodes."""
    return ClusterSpec.model_validate({"workers": len(NODES), "ep": len(NODES), "dispatch": dispatch})


class Routes(NamedTuple):
    """Uniformly random experts for the rows of one rank, and the gates of these choices."""

    expert_NK: Tensor
    gate_NK: Tensor

    @staticmethod
    def draw(model: ModelSpec, tokens: int, rank: int) -> "Routes":
        """Return random routes for the rows of `tokens` tokens; the rank is the seed."""
        moe = model.moe
        assert moe is not None
        generator = torch.Generator().manual_seed(rank)
        score, expert_NK = torch.rand(tokens * moe.heads, moe.experts, generator=generator).topk(moe.top_k)
        return Routes(expert_NK, score.softmax(-1))


class ExpectedBytes(NamedTuple):
    """Bytes that each dispatch sends between nodes in a forward and backward pass, summed over all ranks."""

    flat: int
    hierarchical: int


def expected_bytes(model: ModelSpec, tokens: int) -> ExpectedBytes:
    """Return the bytes that each dispatch must send between nodes for the routes of `Routes.draw`.

    Each rank has `tokens` tokens. Flat dispatch sends rows, outputs and the gradients of both once for each route to an
    expert on another node. Hierarchical dispatch sends them once for each other node that has experts of the row, and
    adds the expert ids and, in both directions, the gates. Both also send counts of rows.
    """
    moe = model.moe
    assert moe is not None
    ranks, k = len(NODES), moe.top_k
    routes = rows = 0
    for rank, node in enumerate(NODES):
        owner_rank_NK = Routes.draw(model, tokens, rank).expert_NK // (moe.experts // ranks)
        is_remote_NK = torch.tensor([owner_node != node for owner_node in NODES])[owner_rank_NK]
        routes += int(is_remote_NK.sum())
        rows += int(is_remote_NK.any(1).sum())  # hierarchical dispatch sends a row to the other node once
    # The factor 4 stands for a row, its output and the gradients of both.
    row_bytes = 4 * VALUE_BYTES * model.row_width
    rank_pairs = sum(a != b for a in NODES for b in NODES)  # ordered pairs of ranks on different nodes
    return ExpectedBytes(
        routes * row_bytes + rank_pairs * moe.experts // ranks * COUNT_BYTES,
        rows * (row_bytes + k * (2 * GATE_BYTES + ID_BYTES)) + ranks * 2 * COUNT_BYTES,
    )
