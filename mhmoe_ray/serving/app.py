"""The Ray Serve application: replicas with an engine each, and a deployment that checks the rate limits of API keys."""

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.errors import MhmoeError
from mhmoe_ray.ray_compat import bind_replica
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.api.access import ExceededLimit, LocalRateLimiter, has_limits
from mhmoe_ray.serving.api.app import create_app, replica_stats
from mhmoe_ray.serving.config import DEPLOYMENT, LIMITS_DEPLOYMENT
from mhmoe_ray.serving.engine import EngineError
from mhmoe_ray.serving.family import serving_of
from mhmoe_ray.serving.load import check_served, load_adapters
from mhmoe_ray.serving.ray_metrics import export_periodically
from mhmoe_ray.spec import KeySpec, ServeSpec
from mhmoe_ray.storage import location

logger = logging.getLogger("ray.serve")


class Args(BaseModel):
    """The `args` of the application in Serve's configuration; see `mhmoe_ray.serving.config`."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    model: str
    """The model's name for clients."""
    serve: ServeSpec
    # This field exists because Serve starts no replicas for a configuration that it already has, even if earlier ones
    # failed.
    again: str = ""
    """Value that makes this configuration differ from an earlier one whose replicas failed."""


# The deployment needs no CPU, so an update always has room for the new replica beside the old one, and requests need
# not wait for the update.
@serve.deployment(name=LIMITS_DEPLOYMENT, num_replicas=1, max_surge_percent=100, ray_actor_options={"num_cpus": 0})
class SharedRateLimiter:
    """Deployment that checks the rate limits of all API keys, in one process for all replicas."""

    def __init__(self, keys: tuple[KeySpec, ...]) -> None:
        bind_replica()
        self._limiter = LocalRateLimiter(keys)

    async def begin_request(self, client: str) -> ExceededLimit | None:
        """Count one more request of a client, or return the rate limit that it has used up."""
        return await self._limiter.begin_request(client)

    async def record_tokens(self, client: str, tokens: int) -> None:
        """Count tokens of a client's prompts and answers against its rate limit."""
        self._limiter.record_tokens(client, tokens)


class RemoteRateLimiter:
    """A replica's `RateLimiter`, which passes all calls on to the deployment `SharedRateLimiter`."""

    def __init__(self, deployment: DeploymentHandle) -> None:
        self._deployment = deployment

    async def begin_request(self, client: str) -> ExceededLimit | None:
        exceeded_limit: ExceededLimit | None = await self._deployment.begin_request.remote(client)
        return exceeded_limit

    def record_tokens(self, client: str, tokens: int) -> None:
        """Count tokens against a client's rate limit, without waiting for the deployment's reply."""
        self._deployment.record_tokens.remote(client, tokens)


@serve.deployment(name=DEPLOYMENT)
@serve.ingress()
class Completions:
    """Deployment whose replicas answer HTTP requests, each with its own engine."""

    def __init__(self, args: Args, rate_limiter: DeploymentHandle | None) -> None:
        # The import is here because only replicas need the model. Serve builds the application in another process.
        from mhmoe_ray.serving.load import load_served

        bind_replica()
        self._args, self._answerer = args, load_served(location(args.checkpoint), args.serve)
        self._is_configured = False
        self._rate_limiter = RemoteRateLimiter(rate_limiter) if rate_limiter else None
        export_periodically(self._answerer.engine.stats, args.model)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve the adapters of Serve's `user_config`, at the start or while requests run."""
        checkpoints = {name: location(path) for name, path in user_config["adapters"].items()}
        try:
            # A thread loads them, because requests go on meanwhile.
            await asyncio.to_thread(load_adapters, self._answerer, checkpoints)
        except MhmoeError as e:
            if not self._is_configured:
                raise
            # Serve would replace the replica, whose other adapters work. Requests for this one are refused.
            logger.error("%s", e)
        self._is_configured = True

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application of this replica. Serve calls it once the replica is constructed."""
        replica = serve.get_replica_context().replica_id.unique_id
        return create_app(
            self._answerer, self._args.model, self._args.serve, replica, self._collect_stats, self._rate_limiter
        )

    async def _collect_stats(self) -> list[dict[str, Any]]:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        stats_list: list[dict[str, Any]] = await handle.broadcast("replica_stats").results_async()
        return stats_list

    async def replica_stats(self) -> dict[str, Any]:
        """Return the statistics that this replica reports at `/stats`."""
        return replica_stats(self._answerer, serve.get_replica_context().replica_id.unique_id)

    def check_health(self) -> None:
        """Raise an error if the engine is broken. Serve calls this regularly and replaces such a replica."""
        if failure_reason := self._answerer.engine.failure_reason:
            raise EngineError(failure_reason)


def build(args: Args) -> serve.Application:
    """Build the server's application, on the cluster, where Serve calls this with the `args` of its configuration.

    A checkpoint that cannot be served is a RayServeException.
    """
    # Replicas make the same checks, but Serve reports their errors only after several tries, as tracebacks. An
    # exception of this function is shown in one line, and Serve gives up at once.
    try:
        checkpoint = location(args.checkpoint)
        manifest = read_manifest(checkpoint, parts=("weights",))
        check_served(manifest, args.serve, RunDir.of_checkpoint(checkpoint))
        serving_of(manifest.model.kind).check_files(checkpoint, manifest)
    except MhmoeError as e:
        raise RayServeException(str(e)) from e
    rate_limiter = None
    if has_limits(args.serve.keys):
        rate_limiter = SharedRateLimiter.bind(args.serve.keys)  # type: ignore[attr-defined]  # it is a Deployment
    return Completions.bind(args, rate_limiter)  # type: ignore[attr-defined]  # a Deployment too
