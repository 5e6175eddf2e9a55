"""The `cluster` section: workers and their resources, the spread of experts over workers, and the hardware to plan for.

`mhmoe plan` computes with the accelerators and links given here. Of a run they change only the metric `mfu`, which is
relative to the accelerator's peak. The defaults are data-sheet figures of NVIDIA's DGX H100, with one 100 Gb/s Ethernet
port per node between domains.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_serializer, model_validator

from mhmoe_ray.spec.base import Precision, Section, WorkerCount, unmeasured


class AcceleratorSpec(Section):
    """Accelerator of each worker, for the estimates of `mhmoe plan` and for the metric `mfu`."""

    name: str = "H100 SXM"
    # Figures of the H100's data sheet, without sparsity.
    bfloat16_flops: PositiveFloat = 989e12
    """Peak FLOP/s of dense matrix products in bfloat16."""
    float32_flops: PositiveFloat = 67e12
    """Peak FLOP/s of dense matrix products in float32, which torch does not replace by TF32 on its own."""
    # This default is an assumption, because data sheets state only peaks. So is the share of the memory bandwidth
    # below.
    flops_share: float = Field(default=0.4, gt=0, le=1)
    """Share of the peak FLOP/s that training reaches while it computes."""
    memory: PositiveFloat = 80e9
    """Bytes of memory."""
    memory_bandwidth: PositiveFloat = 3.35e12
    """Peak memory bandwidth in bytes/s."""
    memory_share: float = Field(default=0.8, gt=0, le=1)
    """Share of the peak memory bandwidth that training reaches."""
    launch_seconds: float = Field(default=4e-6, ge=0)
    """Seconds from the launch of a kernel to that of the next one."""

    def peak_flops(self, precision: Precision) -> float:
        """Return the peak FLOP/s of matrix products in a precision."""
        return self.bfloat16_flops if precision == "bfloat16" else self.float32_flops


class LinkSpec(Section):
    """Network links of one class, such as those within a domain; the defaults are those of InfiniBand."""

    # The default is the bandwidth of one 400 Gb/s InfiniBand port for each GPU.
    bandwidth: PositiveFloat = 50e9
    """Peak bytes/s in each direction, while both directions are in use."""
    per: Literal["rank", "node"] = "rank"
    """Owner of a link. rank: each rank has its own. node: all ranks of a node share one."""
    # The latency that NCCL assumes (`hwLat` in src/graph/tuning.cc) for a ring with protocol LL128 over the network.
    latency: float = Field(default=4e-6, ge=0)
    """Latency of a message in seconds, in addition to the time of its bytes."""


class NodeLinkSpec(LinkSpec):
    """Network links within a node; the defaults are those of NVLink."""

    # NVLink has 900 GB/s for both directions together.
    bandwidth: PositiveFloat = 450e9
    # The latency that NCCL assumes (`hwLat` in src/graph/tuning.cc) for a ring with protocol LL128 over NVLink.
    latency: float = Field(default=1.9e-6, ge=0)


class BetweenLinkSpec(LinkSpec):
    """Network links between domains, such as racks; the defaults are those of Ethernet."""

    # The default is the bandwidth of one 100 Gb/s Ethernet port for each node.
    bandwidth: PositiveFloat = 12.5e9
    per: Literal["rank", "node"] = "node"
    # This default is an assumption, because NCCL's table of latencies has no value for Ethernet.
    latency: float = Field(default=20e-6, ge=0)


class NetworkSpec(Section):
    """Network links between ranks in three classes, for the estimates of `mhmoe plan`."""

    node: NodeLinkSpec = NodeLinkSpec()
    """Links within a node."""
    domain: LinkSpec = LinkSpec()
    """Links between nodes of a domain, such as a rack or a pod."""
    between: BetweenLinkSpec = BetweenLinkSpec()
    """Links between domains."""
    share: float = Field(default=0.8, gt=0, le=1)
    """Share of the peak bandwidths that exchanges between ranks reach."""
    nodes_per_domain: WorkerCount | None = None
    """Nodes per domain of a hypothetical cluster, by default all; on a real one, `domain_label` gives the domains."""


# The data stream gets this number of CPUs, in addition to those of the workers. If workers took every CPU, they would
# starve the stream that feeds them.
STREAM_CPUS = 4


class WorkerRange(Section):
    """Range of the number of workers of a run, or of replicas of a server.

    A single number is a range with equal ends.
    """

    min: WorkerCount
    max: WorkerCount

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"min": value, "max": value}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is more than max ({self.max})")
        return self

    @model_serializer
    def _serialize(self) -> int | dict[str, int]:
        return {"min": self.min, "max": self.max} if self.is_elastic else self.min

    @property
    def is_elastic(self) -> bool:
        return self.min < self.max

    def __str__(self) -> str:
        return f"{self.min} to {self.max}" if self.is_elastic else str(self.min)


MeshSizes = dict[str, int]
"""Number of ranks along each dimension of the device mesh, by name; `ep` is the innermost."""


def format_mesh(sizes: Mapping[str, int]) -> str:
    """Return the sizes of a device mesh as text, such as "dp 2 x ep 4"."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items())


class ShardCacheSpec(Section):
    """Cache on the disk of each node for shards on an object store."""

    path: Path | None = None
    """Folder of the cache, on every node; by default `mhmoe/shards` in the user's cache folder ($XDG_CACHE_HOME or
    ~/.cache)."""
    size_gb: float = Field(default=50.0, ge=0, le=1e9)
    """Largest size of the folder in GB. If all shards of `data.prepared` fit, each is fetched once per node.
    Otherwise only the rows that training reads are fetched, and nothing is kept."""


DEFAULT_SHARD_CACHE = ShardCacheSpec()


class ClusterSpec(Section):
    """Workers with their resources, and the distribution of the model over them.

    On GPUs, values of `ep`, `strategy`, `shard_experts`, `shard_group` and `reduce_after` that a spec does not set are
    chosen to fit the cluster when a run is submitted.
    """

    workers: WorkerRange = WorkerRange(min=1, max=1)
    """Number of workers, or {min: a, max: b} for an elastic run, which uses as many workers as the cluster has room
    for. An elastic run shrinks when it loses a node. It grows after a checkpoint when there is room again. The number
    of workers is always a multiple of ep that divides train.micro_batches, so a and b must be such numbers."""
    ep: WorkerCount = 1
    """Expert parallelism: number of ranks that share one set of experts; workers = dp x ep."""
    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    """Strategy for the parameters that all workers need, which are all but the experts. ddp: each worker has all of
    them. fsdp: each worker has a shard of them (torch's FSDP2). zero1, zero2, zero3: DeepSpeed's ZeRO (extra
    `deepspeed`), which shards the optimizer state, the gradients as well, and the weights as well."""
    shard_experts: bool = False
    """If true, fsdp also shards experts, over the dp workers that hold the same experts."""
    shard_group: WorkerCount | None = None
    """Number of workers over which fsdp shards tensors; by default all. With a number, each group of so many workers
    holds all tensors in shards, and the groups sum their gradients (hybrid sharding). With as many workers as a node
    has, weights are gathered within nodes only. It must be a multiple of ep that divides the number of workers."""
    gather_precision: Precision = "float32"
    """Precision in which fsdp gathers weights. bfloat16 halves the bytes that are sent and held, and needs
    `train.precision` bfloat16. Norms and routers are gathered in float32, and all shards stay float32."""
    reduce_precision: Precision = "float32"
    """Precision in which fsdp sums gradients over the micro-batches of a step and over workers."""
    reduce_after: Literal["step", "micro_batch"] = "step"
    """Backward in which fsdp sums gradients over workers. step: the last one of a step; until then each worker holds
    all gradients in full. micro_batch: each one, so that a worker holds shards of gradients, and sends them as often as
    it has micro-batches."""
    placement: Literal["planned", "pack"] = "planned"
    """Choice of the nodes of workers at each start. planned: nodes are chosen so that as few expert-parallel groups as
    possible span nodes, and then domains; on a cluster with an autoscaler, only domains are chosen. pack: Ray fills one
    node after the other."""
    straddling: Literal["warn", "refuse"] = "warn"
    """Reaction if an expert-parallel group must span more than one node, whenever the run starts or restarts with its
    number of workers. warn: print a warning and start. refuse: end the run before its first step."""
    dispatch: Annotated[Literal["flat", "hierarchical"], unmeasured("deepep", "hybridep")] = "flat"
    """All-to-all of an expert-parallel group that spans several nodes, in which the rows of sub-tokens are sent to
    experts. flat: a row is sent directly to the rank of each of its experts. hierarchical: a row is sent once to each
    other node that holds experts for it, and is forwarded from there."""
    domain_label: str | None = None
    """Label of Ray nodes with the name of the node's domain: nodes that a faster network connects, such as a rack or an
    NVLink domain. An expert-parallel group that must span nodes stays within a domain if possible."""
    accelerator: AcceleratorSpec = AcceleratorSpec()
    network: NetworkSpec = NetworkSpec()
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    max_failures: NonNegativeInt = 3
    """Number of times that a failed or killed worker group is restarted from the last checkpoint. A preemption that was
    announced does not count. An error that a restart would only repeat ends the run at once."""
    hang_seconds: float = Field(default=600, gt=0, allow_inf_nan=True)
    """Timeout in seconds for a heartbeat from each worker and for progress by any worker. After it, the worker that
    hangs is killed and the worker group is restarted. .inf: never."""
    shared_filesystem: bool = False
    """True if a path in this spec refers to the same file on the command line's machine and on every node."""
    shard_cache: ShardCacheSpec = DEFAULT_SHARD_CACHE
    """Cache of each node for shards of training data that lie on an object store."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Ray runtime environment (for example `pip`) of the jobs and of the replicas that serve models."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for workers in (self.workers.min, self.workers.max):
            if workers % self.ep:
                raise ValueError(f"workers ({workers}) must be a multiple of ep ({self.ep})")
        if self.strategy == "zero3" and self.ep > 1:
            raise ValueError(
                "DeepSpeed's ZeRO 3 supports expert parallelism only in its own layers: set ep to 1, or strategy to "
                "fsdp with shard_experts, which shards weights too"
            )
        key = self.changed_key("shard_experts", "shard_group", "gather_precision", "reduce_precision", "reduce_after")
        if key and self.strategy != "fsdp":
            raise ValueError(f"{key} is for strategy fsdp, so it would be ignored with {self.strategy}")
        size = self.shard_group or self.ep
        if size % self.ep:
            raise ValueError(f"shard_group ({size}) must be a multiple of ep ({self.ep})")
        for workers in (self.workers.min, self.workers.max):
            if workers % size:
                raise ValueError(f"workers ({workers}) must be a multiple of shard_group ({size})")
        return self

    @property
    def shard_ranks(self) -> int:
        """Number of ranks over which the strategy shards tensors, at the largest number of ranks."""
        return self.shard_group or self.max_world_size

    @property
    def expert_shard_ranks(self) -> int:
        return self.shard_ranks // self.ep

    @property
    def cpus(self) -> int:
        """Largest number of CPUs that a run takes from Ray, for its workers and its data stream."""
        return self.max_world_size * self.cpus_per_worker + STREAM_CPUS

    @property
    def max_world_size(self) -> int:
        return self.workers.max

    @property
    def shards_experts(self) -> bool:
        """True if the strategy treats experts like other parameters, among the ranks that hold the same experts."""
        return self.strategy != "fsdp" or self.shard_experts

    @property
    def gathers_in_bfloat16(self) -> bool:
        """True if ranks gather sharded weights in bfloat16, and need no copies for matrix products."""
        return self.gather_precision == "bfloat16" and self.max_world_size > 1

    def mesh_sizes(self, world_size: int | None = None) -> MeshSizes:
        """Return the sizes dp and ep of the device mesh, by default for the largest number of ranks."""
        return {"dp": (world_size or self.max_world_size) // self.ep, "ep": self.ep}
