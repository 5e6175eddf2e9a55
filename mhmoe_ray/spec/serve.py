"""The `serve` section: one Ray Serve application per checkpoint; and the sections that a deployment reads from a
spec."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.cluster import ClusterSpec, WorkerRange


class KeySpec(Section):
    """A client that may send requests. `printf %s "$KEY" | sha256sum` gives the hash of its key."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    """Largest number of tokens of prompts and answers per minute. A request that exceeds it is still answered; the
    client's next requests are refused until the limit allows them again."""


class ServeSpec(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: WorkerRange = WorkerRange(min=1, max=1)
    """Number of replicas, or {min: a, max: b}: Serve then adds and removes replicas by the number of requests."""
    surge: bool = True
    """Whether an update starts new replicas beside the old ones, for which the cluster must have room. Otherwise an old
    replica stops taking requests before a new one starts. With one replica, requests wait meanwhile, up to the limit of
    waiting requests, and are refused if the new one cannot start."""
    engine: Literal["torch", "vllm"] = "torch"
    """Inference engine. torch: the engine of this project, on CPUs or one GPU. vllm: vLLM, which must be installed
    where replicas run."""
    cpus_per_replica: PositiveInt = 1
    gpus_per_replica: NonNegativeInt = 0
    tensor_parallel: PositiveInt = 1
    """Number of ranks of vllm, on one node, that share each layer; with GPUs, each rank has one."""
    expert_parallel: bool = False
    """Whether vllm's ranks share experts by whole experts instead of splitting each expert."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and matrix products; routing and the residual stream stay float32."""
    max_tokens: PositiveInt = 512
    """Upper bound of `max_tokens` in a request; prompt and answer together never exceed the sequence length of
    training."""
    max_concurrency: PositiveInt = 32
    """Number of requests that one replica computes at the same time."""
    max_waiting: PositiveInt = 128
    """Number of requests that may wait in one replica; further ones are refused."""
    cache_tokens: PositiveInt | None = None
    """Number of tokens whose keys and values fit into a replica's KV cache. By default it is large enough that none of
    `max_concurrency` requests waits for room."""
    request_timeout: PositiveFloat = 600.0
    """Seconds after which a request fails, including the time it waits. A replica that shuts down has as many seconds
    to finish the requests that it has begun."""
    stream_interval: NonNegativeFloat = 0.05
    """Seconds between two chunks of a streamed answer; the first chunk is sent at once. Tokens that come sooner wait
    for the next chunk. If a replica has more than a dozen streams, the interval grows, up to 0.25, so that the replica
    sends 250 chunks a second for all streams together. 0: one chunk per token, each of which Serve's proxy forwards
    separately."""
    max_body_bytes: PositiveInt = 1 << 20
    log_prompts: bool = False
    """Whether replicas log the text of prompts. Otherwise they log that a request came, without its content."""
    keys: tuple[KeySpec, ...] = ()
    """Clients that may send requests; if there are none, everyone who reaches the port may. MHMOE_API_KEYS in the
    environment of `mhmoe serve deploy`, in the form NAME:KEY,NAME:KEY, adds clients."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.engine == "torch" and self.tensor_parallel > 1:
            raise ValueError("engine torch is one process, so tensor_parallel would be ignored: set engine: vllm")
        if self.expert_parallel and self.tensor_parallel == 1:
            raise ValueError("expert_parallel shares experts out over tensor_parallel ranks, and there is one")
        if self.gpus_per_replica not in (0, self.tensor_parallel):
            raise ValueError(
                f"gpus_per_replica is {self.gpus_per_replica}, and a replica uses {self.tensor_parallel}, or 0 on CPUs"
            )
        return self


class DeploySpec(Section):
    """The sections that serving uses. An imported run has no spec, so all its values are these defaults."""

    cluster: ClusterSpec = ClusterSpec()
    serve: ServeSpec = ServeSpec()
