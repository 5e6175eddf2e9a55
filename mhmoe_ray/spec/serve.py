"""The `serve` section: one Ray Serve application per checkpoint; and what a deployment reads of a spec."""

from pydantic import Field, PositiveInt

from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.cluster import ClusterSpec


class ServeSpec(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: PositiveInt = 1
    cpus_per_replica: PositiveInt = 1
    max_tokens: PositiveInt = 512
    """Upper bound of `max_tokens` in a request; prompt and answer together never exceed the trained length."""
    max_concurrency: PositiveInt = 8
    """Requests that one replica works on at a time; the rest wait in Serve's queue."""


class DeploySpec(Section):
    """The sections that serving uses. A run that was imported has no spec; these defaults are then all there is."""

    cluster: ClusterSpec = ClusterSpec()
    serve: ServeSpec = ServeSpec()
