"""Entry point of the job of `mhmoe data prepare`."""

from collections.abc import Callable
from typing import ClassVar

import yaml

from mhmoe_ray.data.shards.manifest import DataManifest, read_data_manifest
from mhmoe_ray.remote import RemoteJob
from mhmoe_ray.spec import RunSpec, dump_spec


class PrepareRequest(RemoteJob[DataManifest]):
    """Request for the job of `mhmoe data prepare`, which results in a data manifest."""

    module: ClassVar[str] = "mhmoe_ray.data.prepare.job"
    kind: ClassVar[str] = "prepare"

    spec_yaml: str
    """Whole spec, from `dump_spec`."""

    @classmethod
    def from_spec(cls, spec: RunSpec) -> "PrepareRequest":
        return cls(spec_yaml=dump_spec(spec))

    @property
    def spec(self) -> RunSpec:
        return RunSpec.model_validate(yaml.safe_load(self.spec_yaml))

    @property
    def job_name(self) -> str:
        return self.unique_name(self.spec.data.prepared.name)

    def result(self, log: Callable[[], str]) -> DataManifest | None:
        return read_data_manifest(self.spec.data.prepared)

    def execute(self) -> None:
        # The command line imports this module for `PrepareRequest`, and does not need Ray.
        from mhmoe_ray.data.prepare.pipeline import prepare

        prepare(self.spec)


if __name__ == "__main__":
    PrepareRequest.main()
