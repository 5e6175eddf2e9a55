"""The `serve` section, for the Ray Serve application of a checkpoint, and all sections that a deployment reads."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.cluster import ClusterSpec, WorkerRange

ADAPTER_NAME = r"^[A-Za-z0-9_.-]{1,40}$"
"""Pattern of the names of adapters."""


class KeySpec(Section):
    """Client that may send requests, identified by the SHA-256 hash of its API key.

    `printf %s "$KEY" | sha256sum` prints the hash.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    """Limit of the tokens of prompts and answers per minute. A request that exceeds it is still answered. The client's
    next requests are refused until the limit allows them again."""


def is_valid_key(key: str) -> bool:
    """Return whether an API key is printable ASCII, which every HTTP client can send."""
    return key.isascii() and key.isprintable()


class EngineTraits(NamedTuple):
    """Properties of an inference engine."""

    start: str
    """Module and name of the function that starts the engine (`StartEngine`)."""
    check: str | None = None
    """Module and name of a function that raises ServeError if the engine is missing or cannot compute a model; None if
    it computes all decoders. The module does not import the engine's library."""
    has_ranks: bool = False
    """True if a replica may consist of several ranks (`serve.tensor_parallel`)."""
    check_adapter: str | None = None
    """Module and name of a function that raises ServeError if the engine cannot compute an adapter; None if it computes
    all adapters."""


ENGINES = {
    "torch": EngineTraits(start="mhmoe_ray.serving.engine.torch_engine:start_engine"),
    "vllm": EngineTraits(
        start="mhmoe_ray.serving.vllm.engine:VllmEngine",
        check="mhmoe_ray.serving.vllm.folder:check",
        has_ranks=True,
        check_adapter="mhmoe_ray.serving.vllm.adapters:check_adapter",
    ),
}
"""All inference engines by their name in a spec (`serve.engine`)."""
if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[tuple(ENGINES)]


class ServeSpec(Section):
    """Replicas that serve a checkpoint, their inference engine, and the limits of requests."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: WorkerRange = WorkerRange(min=1, max=1)
    """Number of replicas, or {min: a, max: b} to let Serve add and remove replicas by the number of requests."""
    surge: bool = True
    """Order of steps when an update replaces replicas. true: each new replica starts before an old one stops, so the
    cluster must have room for both. false: an old replica stops taking requests before a new one starts. With a single
    replica, requests then wait, at most `max_waiting` of them, and they are refused if the new replica cannot start."""
    engine: EngineName = "torch"
    """Inference engine. torch: this project's, on CPUs or one GPU. vllm: vLLM, which replicas' nodes must have."""
    cpus_per_replica: PositiveInt = 1
    gpus_per_replica: NonNegativeInt = 0
    tensor_parallel: PositiveInt = 1
    """Number of vLLM's ranks on one node, each of which has a part of every layer. With GPUs, each rank has one GPU."""
    expert_parallel: bool = False
    """If true, each of vLLM's ranks has some of the experts. If false, each rank has a part of every expert."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine, such as {enable_prefix_caching: false}, in the spelling of its `EngineArgs`,
    and `tool_call_parser`, the name of one of vLLM's parsers of tool calls."""
    adapters: dict[Annotated[str, Field(pattern=ADAPTER_NAME)], str] = Field(default_factory=dict)
    """Adapters (`train.adapter`) of the served model, by the name with which requests ask for them as their `model`:
    RUN, RUN@STEP, or the folder of a checkpoint. Each was trained on weights equal to the served ones."""
    max_adapters: NonNegativeInt = 0
    """Number of adapters that a deployment may have at a time with `mhmoe serve adapters`; at least those of
    `adapters`. With any, experts on a GPU run one after another with engine torch; engine vllm has none of routers and
    routed experts, and needs `vllm.max_lora_rank` for ranks above 16."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the served weights and of matrix products. It may differ from the precision of training. Routing and
    the residual stream are always in float32."""
    max_tokens: PositiveInt = 512
    """Upper bound of the number of new tokens (`max_tokens`) that a request may ask for. Prompt and answer together
    never exceed the sequence length of training."""
    max_concurrency: PositiveInt = 32
    """Number of requests that one replica computes at the same time. If one client's requests fill a replica, another
    client can start its share of this number too."""
    max_waiting: PositiveInt = 128
    """Largest number of requests that wait in one replica; further requests are refused."""
    cache_tokens: PositiveInt | None = None
    """Capacity of a replica's KV cache in tokens; by default none of `max_concurrency` requests waits for space.
    There is room for one more request of full length, which is kept for clients without running requests."""
    request_timeout: PositiveFloat = 600.0
    """Timeout of a request in seconds, including the time that it waits. A replica that shuts down has the same time to
    finish its running requests."""
    stream_interval: NonNegativeFloat = 0.05
    """Seconds between two chunks of a streamed answer, after the first, which is sent at once. With more than a dozen
    streams, the interval grows, up to 0.25, so that a replica sends 250 chunks a second for all together. 0: one chunk
    per token, each of which Serve's proxy forwards separately."""
    max_body_bytes: PositiveInt | None = None
    """Largest body of a request in bytes; by default 1 MiB, and 16 MiB for models that read images. A replica also
    refuses requests while the bodies of unanswered ones exceed 32 times this size, but at least 256 MiB."""
    log_prompts: bool = False
    """If true, replicas log the text of each prompt; else a line for each request without any text of it."""
    keys: tuple[KeySpec, ...] = ()
    """Clients that may send requests. Without any client, everybody who can reach the port may send requests.
    MHMOE_API_KEYS in the environment of `mhmoe serve deploy` adds clients, in the form NAME:KEY,NAME:KEY."""
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")], ...] = ()
    """Origins of web pages that may send requests from a browser, such as https://example.com, or "*" for all pages."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tensor_parallel > 1 and not ENGINES[self.engine].has_ranks:
            engines = " or ".join(name for name, traits in ENGINES.items() if traits.has_ranks)
            reason = f"engine {self.engine} is one process, so tensor_parallel would be ignored"
            raise ValueError(f"{reason}: set engine: {engines}")
        if self.vllm and self.engine != "vllm":
            raise ValueError(f"vllm has arguments of vLLM's engine, and engine is {self.engine}: set engine: vllm")
        if self.expert_parallel and self.tensor_parallel == 1:
            raise ValueError("expert_parallel divides experts among tensor_parallel ranks, and there is one rank")
        if self.gpus_per_replica not in (0, self.tensor_parallel):
            raise ValueError(
                f"gpus_per_replica is {self.gpus_per_replica}, but a replica uses {self.tensor_parallel}, or 0 on CPUs"
            )
        return self


class DeploySpec(Section):
    """Sections of a spec that serving uses; an imported run has none, so the defaults apply to it."""

    cluster: ClusterSpec = ClusterSpec()
    serve: ServeSpec = ServeSpec()
