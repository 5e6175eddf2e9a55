"""The `tracking` section: where else a run's numbers go."""

from typing import Self

from pydantic import Field, model_validator

from mhmoe_ray.spec.base import Section


class TrackingSpec(Section):
    mlflow: str | None = Field(default=None, min_length=1)
    """A tracking server of MLflow, http(s)://host:port, or what else MLflow takes for one (extra `mlflow`). A user name
    or token for it comes from MLflow's own environment variables, never from here."""
    experiment: str = Field(default="mhmoe", min_length=1)
    """Of MLflow, that the run belongs to."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mlflow and "@" in self.mlflow.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "mlflow holds a user name, which everybody who reads the spec would see: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where workers run"
            )
        return self
