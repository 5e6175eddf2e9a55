"""The `cluster` section: workers, what each gets, how experts are spread over them, and the hardware to plan for.

`mhmoe plan` reckons with the accelerators and links named here. Nothing is computed otherwise for them, but a run's
`mfu` is relative to the accelerator's peak: on others than the default, name theirs.

Defaults are data-sheet figures of NVIDIA's DGX H100 (H100 SXM: 80 GB, 3.35 TB/s; 989 TFLOP/s in bfloat16 without
sparsity, 67 in float32; NVLink of 900 GB/s, which is 450 each way; a 400 Gb/s InfiniBand port for each GPU), and
between domains one 100 Gb/s Ethernet port for each node. Latencies of the first two are those by which NCCL picks an
algorithm (`hwLat` of its src/graph/tuning.cc: ring, LL128, over NVLink and over the network); that of Ethernet is an
assumption, as are the shares of a peak that are reached.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_serializer, model_validator

from mhmoe_ray.spec.base import Section


class AcceleratorSpec(Section):
    name: str = "H100 SXM"
    bfloat16_flops: PositiveFloat = 989e12
    """Peak FLOP/s of dense matrix products in bfloat16."""
    float32_flops: PositiveFloat = 67e12
    """The same in float32, which torch does not turn to TF32 by itself."""
    flops_share: float = Field(default=0.4, gt=0, le=1)
    """Of that peak, what training reaches while it computes."""
    memory: PositiveFloat = 80e9
    """Bytes."""
    memory_bandwidth: PositiveFloat = 3.35e12
    """Peak bytes/s."""
    memory_share: float = Field(default=0.8, gt=0, le=1)
    """Of that peak, what is reached."""

    def peak(self, precision: Literal["float32", "bfloat16"]) -> float:
        """FLOP/s of matrix products."""
        return self.bfloat16_flops if precision == "bfloat16" else self.float32_flops


class LinkSpec(Section):
    """By default InfiniBand."""

    bandwidth: PositiveFloat = 50e9
    """Peak bytes/s, each way at once."""
    per: Literal["rank", "node"] = "rank"
    """Whether each rank has such a link, or all ranks of a node share one."""
    latency: float = Field(default=4e-6, ge=0)
    """Seconds that a message takes beside its bytes."""


class NodeLinkSpec(LinkSpec):
    """By default NVLink."""

    bandwidth: PositiveFloat = 450e9
    latency: float = Field(default=1.9e-6, ge=0)


class BetweenLinkSpec(LinkSpec):
    """By default Ethernet."""

    bandwidth: PositiveFloat = 12.5e9
    per: Literal["rank", "node"] = "node"
    latency: float = Field(default=20e-6, ge=0)


class NetworkSpec(Section):
    node: NodeLinkSpec = NodeLinkSpec()
    """Links within a node."""
    domain: LinkSpec = LinkSpec()
    """Links between nodes of a domain: a rack, a pod."""
    between: BetweenLinkSpec = BetweenLinkSpec()
    """Links between domains."""
    share: float = Field(default=0.8, gt=0, le=1)
    """Of peak bandwidths, what is reached."""
    nodes_per_domain: PositiveInt | None = None
    """Of a cluster on paper; by default all are in one. Of a real one, `domain_label` tells."""


STREAM_CPUS = 4  # beside the workers' own: workers that take every CPU starve the stream that feeds them


class WorkerRange(Section):
    """How many workers a run may have, or replicas a server; written as a number where that is one."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, given: Any) -> Any:
        return given if isinstance(given, dict) else {"min": given, "max": given}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is more than max ({self.max})")
        return self

    @model_serializer
    def _as_written(self) -> int | dict[str, int]:
        return {"min": self.min, "max": self.max} if self.elastic else self.min

    @property
    def elastic(self) -> bool:
        return self.min < self.max

    def __str__(self) -> str:
        return f"{self.min} to {self.max}" if self.elastic else str(self.min)


MeshSizes = dict[str, int]
"""Ranks along each dimension of the mesh by its name, outermost first; experts are innermost."""


def mesh_in_words(sizes: Mapping[str, int]) -> str:
    """Return the sizes of a mesh as people read them: dp 2 x ep 4."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items())


class ClusterSpec(Section):
    workers: WorkerRange = WorkerRange(min=1, max=1)
    """A number, or {min: a, max: b}: then the run has as many as there is room for. It shrinks when it loses a node
    and grows, after a checkpoint, when there is room again; numbers between are multiples of ep that divide
    train.micro_batches, as a and b must be."""
    ep: PositiveInt = 1
    """Expert parallelism: ranks that share one set of experts. workers = dp x ep."""
    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    """How workers hold what they all need, that is all but the experts. ddp: each has all of it. fsdp: each has a
    slice, by torch's FSDP2. zero1, zero2, zero3: DeepSpeed's ZeRO, which slices the optimizer's state, gradients too,
    weights too (extra `deepspeed`)."""
    shard_experts: bool = False
    """With fsdp, slice experts too, over the dp workers that hold the same ones."""
    straddling: Literal["warn", "refuse"] = "warn"
    """What to do where an expert-parallel group must lie on more than one node. refuse: a run that would start so ends,
    at whatever size of `workers` it would be."""
    dispatch: Literal["flat", "hierarchical"] = "flat"
    """How rows go to experts of an expert-parallel group that lies on several nodes. flat: each route's row straight to
    its expert's rank. hierarchical: a row once to each node with experts for it, and on from there."""
    domain_label: str | None = None
    """Label of Ray's nodes whose value names what a faster network joins, a rack or an NVLink domain: a group that must
    lie on several nodes lies within one such domain where it can."""
    accelerator: AcceleratorSpec = AcceleratorSpec()
    network: NetworkSpec = NetworkSpec()
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    max_failures: NonNegativeInt = 3
    """Times a failed or killed worker group is started again from the last checkpoint. Nodes that are announced to be
    taken away (preemption) do not count; a mistake that a new start would only repeat ends the run at once."""
    hang_seconds: float = Field(default=600, gt=0, allow_inf_nan=True)
    """Without a sign of life from a worker, or without progress of any: then the one that stands still is ended, and
    the group is started again; .inf: never."""
    shared_filesystem: bool = False
    """Paths of this spec mean the same files on the machine of the command line and on every node."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Ray runtime environment (for example `pip`) of jobs and of replicas."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for workers in (self.workers.min, self.workers.max):
            if workers % self.ep:
                raise ValueError(f"workers ({workers}) must be a multiple of ep ({self.ep})")
        if self.strategy == "zero3" and self.ep > 1:
            raise ValueError(
                "DeepSpeed's ZeRO 3 knows no expert parallelism but its own layers': set ep to 1, or strategy to fsdp "
                "with shard_experts, which slices weights too"
            )
        if self.shard_experts and self.strategy != "fsdp":
            raise ValueError(f"strategy {self.strategy} leaves experts whole, so shard_experts would be ignored")
        return self

    @property
    def cpus(self) -> int:
        """Logical CPUs that a run takes at most, its data stream included."""
        return self.world * self.cpus_per_worker + STREAM_CPUS

    @property
    def world(self) -> int:
        """Ranks, at most."""
        return self.workers.max

    @property
    def slices_experts(self) -> bool:
        """Whether ranks that hold the same experts share out of them what the strategy shares out of all else."""
        return self.strategy != "fsdp" or self.shard_experts

    def mesh_sizes(self, world: int | None = None) -> MeshSizes:
        """Return the mesh of so many ranks, by default of as many as there are at most."""
        return {"dp": (world or self.world) // self.ep, "ep": self.ep}
