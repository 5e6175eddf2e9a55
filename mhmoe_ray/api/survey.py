"""A survey of raw text, which a job on the cluster makes, and the data that it is about."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhmoe_ray.api.connection import check_raw_data, connect_to_cluster
from mhmoe_ray.api.defaults import SPEC_SUFFIXES, OnNote, ignore_note
from mhmoe_ray.api.spec import load_spec
from mhmoe_ray.checkpoint.start.record import plan_start
from mhmoe_ray.cluster import remote
from mhmoe_ray.cluster.remote import SubmittedJob
from mhmoe_ray.data.inspect.result import Survey, SurveyRequest
from mhmoe_ray.data.shards.manifest import TOKENIZER_FILE, DataManifest, read_data_manifest
from mhmoe_ray.data.shards.recipe import check_recipe
from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec import ClusterSpec, DataSpec, RunSpec
from mhmoe_ray.spec.raw_text import raw_text_sections
from mhmoe_ray.storage import Location


@dataclass(frozen=True)
class SurveyTarget:
    """The data that a survey reads: raw text and, with a spec, the folder of prepared shards."""

    data: DataSpec
    cluster: ClusterSpec
    spec: RunSpec | None = None
    manifest: DataManifest | None = None

    @property
    def name(self) -> str:
        return self.spec.name if self.spec else ", ".join(self.data.sources)

    @property
    def tokenizer(self) -> Location | None:
        """Path of the prepared folder's tokenizer, else of the tokenizer that the spec gives; None without either."""
        # The prepared folder of a vision model has no tokenizer.
        has_prepared_tokenizer = self.manifest is not None and self.manifest.tokenizer_sha256 is not None
        return self.data.prepared / TOKENIZER_FILE if has_prepared_tokenizer else self.data.tokenizer

    @property
    def samples_before(self) -> Mapping[str, int] | None:
        """Samples of each domain that earlier runs have read, whose order the spec's run continues, if any."""
        record = plan_start(self.spec) if self.spec else None
        return record.samples_before if record else None

    @property
    def required_paths(self) -> list[Location]:
        """Paths on this machine that all nodes of the cluster must be able to read."""
        if self.spec:
            return [self.data.prepared]
        # URLs are left out, because all nodes can reach an object store.
        paths: list[Location] = [Path(source.path) for source in self.data.sources.values() if "://" not in source.path]
        return paths + [path for path in (self.data.tokenizer, self.data.chat_template) if path]

    def prepared_as_json(self) -> dict[str, Any] | None:
        """Return the manifest of the prepared folder, without its recipe and lists of files; None without one."""
        if self.manifest is None:
            return None
        totals = self.manifest.model_dump(exclude={"recipe", "domains", "validation"})
        domains = {name: domain.model_dump(exclude={"shards"}) for name, domain in self.manifest.domains.items()}
        return {"folder": str(self.data.prepared), **totals, "domains": domains}


def survey_target(names: Sequence[str], overrides: Sequence[str] = ()) -> SurveyTarget:
    """Return the data that is named: the file of a spec, or raw text, of which each path becomes one source.

    Prepared data that was made with other settings is a DataError.
    """
    specs = [name for name in names if name.endswith(SPEC_SUFFIXES)]
    if not specs:
        return SurveyTarget(*raw_text_sections(names, overrides))
    if len(names) > 1:
        raise SpecError(f"spec {specs[0]}", "it is named together with other data", "give one spec, or raw text alone")
    spec = load_spec(specs[0], overrides)
    manifest = read_data_manifest(spec.data.prepared)
    if manifest is not None:
        check_recipe(spec.data.prepared, manifest, spec)
    return SurveyTarget(spec.data, spec.cluster, spec, manifest)


def survey(
    target: SurveyTarget,
    address: str | None = None,
    *,
    check_rules: bool,
    follow: Callable[[SubmittedJob[Survey]], None],
    on_note: OnNote = ignore_note,
) -> Survey:
    """Read all raw text of a target in a job on the cluster, and return the survey of its contents.

    `follow` shows the progress of the job and returns when it ends. Errors are missing text, a chat template that
    cannot be used, and the job's own.
    """
    check_raw_data(target.data)
    connection = connect_to_cluster(target.cluster, target.required_paths, 1, address, on_note)
    request = SurveyRequest(data=target.data, tokenizer=target.tokenizer, rules=check_rules)
    job = remote.submit(connection, target.cluster.runtime_env, request, on_note)
    follow(job)
    return job.result(f"data of {target.name}")
