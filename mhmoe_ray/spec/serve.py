"""The `serve` section: one Ray Serve application per checkpoint; and what a deployment reads of a spec."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.cluster import ClusterSpec, WorkerRange


class KeySpec(Section):
    """A client that may ask. `printf %s "$KEY" | sha256sum` gives the hash of its key."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    """Of prompts and answers. The request that goes beyond it is answered; the next ones wait for the minute."""


class ServeSpec(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: WorkerRange = WorkerRange(min=1, max=1)
    """A number, or {min: a, max: b}: then Serve adds and removes some, by how many requests there are."""
    surge: bool = True
    """Whether an update starts new replicas beside the old ones, for which the cluster must have room. Else an old one
    takes no more requests before a new one starts. With one replica requests wait meanwhile, as many as may, and are
    refused if the new one cannot start."""
    engine: Literal["torch", "vllm"] = "torch"
    """torch: our own, on CPUs or one GPU. vllm: vLLM, which must be installed where replicas run."""
    cpus_per_replica: PositiveInt = 1
    gpus_per_replica: NonNegativeInt = 0
    tensor_parallel: PositiveInt = 1
    """Of vllm: ranks, on one node, that share each layer; with GPUs, one each."""
    expert_parallel: bool = False
    """Of vllm: these ranks share experts out whole, not each expert in parts."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of weights and matrix products; routing and what layers add up stay float32."""
    max_tokens: PositiveInt = 512
    """Upper bound of `max_tokens` in a request; prompt and answer together never exceed the trained length."""
    max_concurrency: PositiveInt = 32
    """Requests that one replica computes at a time."""
    max_waiting: PositiveInt = 128
    """Requests that wait in one replica; any more are refused."""
    cache_tokens: PositiveInt | None = None
    """Tokens whose keys and values a replica has room for. By default so many that none of `max_concurrency` requests
    waits for room."""
    request_timeout: PositiveFloat = 600.0
    """Seconds, waiting included, after which a request fails, and for which a replica that is to end ends what it has
    begun."""
    stream_interval: NonNegativeFloat = 0.05
    """Seconds between two chunks of a streamed answer, the first of which comes at once: tokens that come sooner wait
    for it, and where a replica has more than a dozen streams longer, up to 0.25, so that it sends 250 chunks a second
    for all of them. 0: a chunk for each token, each of which Serve's proxy hands on by itself."""
    max_body_bytes: PositiveInt = 1 << 20
    log_prompts: bool = False
    """Whether replicas log what they are asked; else they log that, and nothing of it."""
    keys: tuple[KeySpec, ...] = ()
    """Clients that may ask; without any, everyone who reaches the port. MHMOE_API_KEYS in the environment of `mhmoe
    serve deploy`, as NAME:KEY,NAME:KEY, adds some."""

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
    """The sections that serving uses. A run that was imported has no spec; these defaults are then all there is."""

    cluster: ClusterSpec = ClusterSpec()
    serve: ServeSpec = ServeSpec()
