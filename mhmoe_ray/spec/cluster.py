"""The `cluster` section: workers and their resources, the spread of experts over workers, and the hardware to plan for.

`mhmoe plan` computes with the accelerators and links given here. They do not change what a run computes, but its `mfu`
is relative to the accelerator's peak: for accelerators other than the default, set their values.

Defaults are data-sheet figures of NVIDIA's DGX H100 (H100 SXM: 80 GB, 3.35 TB/s; 989 TFLOP/s in bfloat16 without
sparsity, 67 in float32; NVLink of 900 GB/s, which is 450 each way; a 400 Gb/s InfiniBand port for each GPU), and
between domains one 100 Gb/s Ethernet port for each node. Latencies of the first two are those by which NCCL picks an
algorithm (`hwLat` of its src/graph/tuning.cc: ring, LL128, over NVLink and over the network). Ethernet's latency is an
assumption, and so are the shares of a peak that are reached.
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
    """Peak FLOP/s of dense matrix products in float32, which torch does not replace by TF32 on its own."""
    flops_share: float = Field(default=0.4, gt=0, le=1)
    """Share of the peak FLOP/s that training reaches while it computes."""
    memory: PositiveFloat = 80e9
    """Bytes of memory."""
    memory_bandwidth: PositiveFloat = 3.35e12
    """Peak memory bandwidth in bytes/s."""
    memory_share: float = Field(default=0.8, gt=0, le=1)
    """Share of the peak memory bandwidth that is reached."""

    def peak(self, precision: Literal["float32", "bfloat16"]) -> float:
        """Return the peak FLOP/s of matrix products in a precision."""
        return self.bfloat16_flops if precision == "bfloat16" else self.float32_flops


class LinkSpec(Section):
    """Links of one class; the defaults are those of InfiniBand."""

    bandwidth: PositiveFloat = 50e9
    """Peak bytes/s in each direction, both at the same time."""
    per: Literal["rank", "node"] = "rank"
    """Whether each rank has such a link, or all ranks of a node share one."""
    latency: float = Field(default=4e-6, ge=0)
    """Latency of a message in seconds, in addition to the time of its bytes."""


class NodeLinkSpec(LinkSpec):
    """Links within a node; the defaults are those of NVLink."""

    bandwidth: PositiveFloat = 450e9
    latency: float = Field(default=1.9e-6, ge=0)


class BetweenLinkSpec(LinkSpec):
    """Links between domains; the defaults are those of Ethernet."""

    bandwidth: PositiveFloat = 12.5e9
    per: Literal["rank", "node"] = "node"
    latency: float = Field(default=20e-6, ge=0)


class NetworkSpec(Section):
    node: NodeLinkSpec = NodeLinkSpec()
    """Links within a node."""
    domain: LinkSpec = LinkSpec()
    """Links between nodes of a domain, such as a rack or a pod."""
    between: BetweenLinkSpec = BetweenLinkSpec()
    """Links between domains."""
    share: float = Field(default=0.8, gt=0, le=1)
    """Share of the peak bandwidths that is reached."""
    nodes_per_domain: PositiveInt | None = None
    """Nodes per domain of a hypothetical cluster; by default all nodes are in one domain. On a real cluster,
    `domain_label` gives the domains."""


STREAM_CPUS = 4  # beside the workers' own: workers that take every CPU starve the stream that feeds them


class WorkerRange(Section):
    """Number of workers of a run, or of replicas of a server, as a range; written as a single number if both ends are
    equal."""

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
"""Number of ranks along each mesh dimension, by its name, outermost first; the expert dimension is innermost."""


def mesh_in_words(sizes: Mapping[str, int]) -> str:
    """Return the sizes of a mesh in readable form, such as "dp 2 x ep 4"."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items())


class ClusterSpec(Section):
    workers: WorkerRange = WorkerRange(min=1, max=1)
    """Number of workers, or {min: a, max: b} for an elastic run, which uses as many workers as the cluster has room
    for. It shrinks when it loses a node and grows, after a checkpoint, when there is room again. Numbers in between are
    multiples of ep that divide train.micro_batches; a and b must be such numbers too."""
    ep: PositiveInt = 1
    """Expert parallelism: number of ranks that share one set of experts (an expert-parallel group). workers = dp x
    ep."""
    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    """How workers hold the parameters that they all need, that is all but the experts. ddp: each worker has all of
    them. fsdp: each has a shard, by torch's FSDP2. zero1, zero2, zero3: DeepSpeed's ZeRO, which shards the optimizer
    state (zero1), also gradients (zero2), also weights (zero3); it needs the extra `deepspeed`."""
    shard_experts: bool = False
    """Whether fsdp shards experts too, over the dp workers that hold the same ones."""
    straddling: Literal["warn", "refuse"] = "warn"
    """Reaction if an expert-parallel group must span more than one node. warn: warn and go on. refuse: end a run that
    would start this way, with whatever number of `workers`."""
    dispatch: Literal["flat", "hierarchical"] = "flat"
    """How rows are sent to experts in an expert-parallel group that spans several nodes. flat: each route's row is sent
    directly to the rank of its expert. hierarchical: a row is sent once to each other node that holds experts for it,
    and is forwarded from there."""
    domain_label: str | None = None
    """Label of Ray nodes whose value names a domain that a faster network connects, such as a rack or an NVLink domain.
    A group that must span several nodes stays within one such domain if possible."""
    accelerator: AcceleratorSpec = AcceleratorSpec()
    network: NetworkSpec = NetworkSpec()
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    max_failures: NonNegativeInt = 3
    """Number of times that a failed or killed worker group is restarted from the last checkpoint. Announced losses of
    nodes (preemption) do not count; an error that a restart would only repeat ends the run at once."""
    hang_seconds: float = Field(default=600, gt=0, allow_inf_nan=True)
    """Seconds without a heartbeat from a worker, or without progress by any worker, after which the worker that hangs
    is killed and the worker group restarted; .inf: never."""
    shared_filesystem: bool = False
    """Whether paths in this spec refer to the same files on the command line's machine and on every node."""
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
        """Largest number of logical CPUs that a run uses, including those of its data stream."""
        return self.world * self.cpus_per_worker + STREAM_CPUS

    @property
    def world(self) -> int:
        """Largest number of ranks of the run."""
        return self.workers.max

    @property
    def slices_experts(self) -> bool:
        """Whether the strategy shards experts, over the ranks that hold the same ones, in the same way as all other
        parameters."""
        return self.strategy != "fsdp" or self.shard_experts

    def mesh_sizes(self, world: int | None = None) -> MeshSizes:
        """Return the sizes of the mesh of `world` ranks, by default of the largest number of ranks."""
        return {"dp": (world or self.world) // self.ep, "ep": self.ep}
