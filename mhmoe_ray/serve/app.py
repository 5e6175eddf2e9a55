"""The Ray Serve application: replicas with an engine each, and one deployment that counts the usage of API keys."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.errors import MhmoeError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serve.answer import edge_texts
from mhmoe_ray.serve.api.access import Limits, Spent, any_limit
from mhmoe_ray.serve.api.app import create_app, told
from mhmoe_ray.serve.chat_template import ChatTemplate
from mhmoe_ray.serve.config import DEPLOYMENT, LIMITS
from mhmoe_ray.serve.engine import EngineError
from mhmoe_ray.serve.load import check_engine
from mhmoe_ray.serve.ray_metrics import follow
from mhmoe_ray.spec import KeySpec, ServeSpec
from mhmoe_ray.storage import location


class Args(BaseModel):
    """The `args` of the application in Serve's configuration; see `mhmoe_ray.serve.config`."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    model: str
    """The model's name for clients."""
    serve: ServeSpec
    again: str = ""
    """A value that makes this configuration differ from an earlier one whose replicas failed: Serve starts no replicas
    for a configuration that it already has."""


# An update starts the new one beside the old one, for which there is room everywhere: requests do not wait for it.
@serve.deployment(name=LIMITS, num_replicas=1, max_surge_percent=100, ray_actor_options={"num_cpus": 0})
class SharedLimits:
    """The limits of all API keys, in one process that all replicas share."""

    def __init__(self, keys: tuple[KeySpec, ...]) -> None:
        self._limits = Limits(keys)

    async def begin(self, client: str) -> Spent | None:
        return await self._limits.begin(client)

    async def used(self, client: str, tokens: int) -> None:
        self._limits.used(client, tokens)


class There:
    """A `Counter` that forwards to `SharedLimits` from a replica."""

    def __init__(self, limits: DeploymentHandle) -> None:
        self._limits = limits

    async def begin(self, client: str) -> Spent | None:
        found: Spent | None = await self._limits.begin.remote(client)
        return found

    def used(self, client: str, tokens: int) -> None:
        self._limits.used.remote(client, tokens)


@serve.deployment(name=DEPLOYMENT)
@serve.ingress()
class Completions:
    def __init__(self, args: Args, limits: DeploymentHandle | None) -> None:
        # Imported only by replicas: Serve builds the application in a process that needs no model.
        from mhmoe_ray.serve.load import load_answerer

        self._args, self._answerer = args, load_answerer(location(args.checkpoint), args.serve)
        self._limits = There(limits) if limits else None
        follow(self._answerer.engine.stats, args.model)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application of this replica. Serve calls it once the replica is constructed."""
        replica = serve.get_replica_context().replica_id.unique_id
        return create_app(self._answerer, self._args.model, self._args.serve, replica, self._everyone, self._limits)

    async def _everyone(self) -> list[dict[str, Any]]:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        found: list[dict[str, Any]] = await handle.broadcast("told").results_async()
        return found

    async def told(self) -> dict[str, Any]:
        """Return this replica's entry of `/stats`."""
        return told(self._answerer, serve.get_replica_context().replica_id.unique_id)

    def check_health(self) -> None:
        """Raise if the engine is broken. Serve calls this and replaces a replica that raises."""
        if why := self._answerer.engine.why_broken:
            raise EngineError(why)


def build(args: Args) -> serve.Application:
    """Build the application. Serve calls this on the cluster, with the `args` of its configuration.

    Raises:
        RayServeException: the checkpoint cannot be served. This is checked here as well as in each replica, because
            Serve shows this exception as one line and gives up; an exception of a replica becomes a traceback after
            several tries.
    """
    try:
        checkpoint = location(args.checkpoint)
        manifest = read_manifest(checkpoint, parts=("weights",))
        check_engine(manifest, args.serve)
        tokenizer = load_run_tokenizer(checkpoint, manifest)
        ChatTemplate.of_run(RunDir.of_checkpoint(checkpoint), *edge_texts(tokenizer))
    except MhmoeError as e:
        raise RayServeException(str(e)) from e
    limits = None
    if any_limit(args.serve.keys):
        limits = SharedLimits.bind(args.serve.keys)  # type: ignore[attr-defined]  # a Deployment by its decorator
    return Completions.bind(args, limits)  # type: ignore[attr-defined]  # the same
