"""What `mhmoe data inspect` and `lint` share: which data are meant, and a survey of them as a job of the cluster."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli import connecting
from mhmoe_ray.cli.common import SPEC_SUFFIXES, read_spec
from mhmoe_ray.cli.job import Job

if TYPE_CHECKING:
    from mhmoe_ray.data.inspect.result import Survey
    from mhmoe_ray.data.shards.manifest import DataManifest
    from mhmoe_ray.spec import ClusterSpec, DataSpec, RunSpec

WhatArg = Annotated[
    list[str],
    typer.Argument(help="A spec (.yaml); or folders, files or patterns of raw text.", show_default=False),
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec; of raw text, of its data or cluster."),
]


@dataclass
class What:
    """The data that a command is about."""

    name: str
    data: "DataSpec"
    cluster: "ClusterSpec"
    needed: list[Path]
    """What the nodes must see of this machine's."""
    spec: "RunSpec | None"
    """None for raw text."""
    manifest: "DataManifest | None"
    """Of the prepared folder, if there is one."""

    @property
    def tokenizer(self) -> Path | None:
        """The prepared folder's, else the one that the spec gives."""
        return self.data.prepared / "tokenizer.json" if self.manifest else self.data.tokenizer


def what_is_meant(what: list[str], overrides: list[str]) -> What:
    """Raises:
    SpecError: a spec is wrong, or stands beside something else.
    DataError: prepared data were made with other settings.
    """
    from mhmoe_ray.data.shards.manifest import check_recipe, read_data_manifest
    from mhmoe_ray.errors import SpecError

    specs = [name for name in what if name.endswith(SPEC_SUFFIXES)]
    if not specs:
        return raw_text(what, overrides)
    if len(what) > 1:
        raise SpecError(f"spec {specs[0]}", "it stands beside other data", "give one spec, or raw text alone")
    spec = read_spec(Path(specs[0]), overrides)
    manifest = read_data_manifest(spec.data.prepared)
    if manifest is not None:
        check_recipe(spec.data.prepared, manifest, spec)
    return What(spec.name, spec.data, spec.cluster, [spec.data.prepared], spec, manifest)


def raw_text(what: list[str], overrides: list[str]) -> What:
    """Each path as a source of its own, named by the last part of it that is no pattern."""
    from mhmoe_ray.spec import ClusterSpec, DataSpec, checked, overridden
    from mhmoe_ray.spec.data import absolute

    sources: dict[str, Any] = {}
    for path in what:
        parts = [part for part in path.partition("?")[0].split("/") if part and "*" not in part]
        name = parts[-1] if parts else "text"
        while name in sources:
            name += "-"
        sources[name] = {"path": absolute(Path.cwd(), path)}
    # Nothing is prepared, and no text is left out for lying in that folder.
    tree: dict[str, Any] = {"data": {"sources": sources, "prepared": os.devnull, "seq_len": 1}, "cluster": {}}
    overridden(tree, overrides)
    named = f"text {', '.join(what)}"
    data, cluster = checked(DataSpec, tree["data"], named, "data."), checked(ClusterSpec, tree["cluster"], named)
    if data.tokenizer:
        data = data.model_copy(update={"tokenizer": Path.cwd() / data.tokenizer})
    needed = [Path(source.path) for source in data.sources.values() if "://" not in source.path]
    needed += [data.tokenizer] if data.tokenizer else []
    return What(", ".join(data.sources), data, cluster, needed, None, None)


def make(what: What, address: str | None, *, rules: bool) -> "Survey":
    """Read all of it on the cluster.

    Args:
        what: to read.
        address: of the cluster.
        rules: whether texts are held against the rules of `lint`.

    Raises:
        MhmoeError: as the job's own.
    """
    from mhmoe_ray.data.inspect import SAYS
    from mhmoe_ray.data.inspect.result import Request, survey_in
    from mhmoe_ray.data.sources import find_files

    find_files(what.data)
    connection = connecting.cluster_for(what.cluster, what.needed, 1, address)
    request = Request(data=what.data, tokenizer=what.tokenizer, rules=rules)
    env = {"MHMOE_REQUEST": request.packed()}
    job = Job.start(connection, what.cluster, "mhmoe_ray.data.inspect.job", "inspect", env)
    job.say(SAYS)
    found = survey_in(job.log)
    if found is None:
        raise job.error(f"data of {what.name}")
    return found
