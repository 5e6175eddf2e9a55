"""`mhmoe data inspect`: the contents of raw text and its shards; `mhmoe data lint`: the problems in it.

Both use a survey of the text, which a job on the cluster makes.
"""

import os
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray import pictures
from mhmoe_ray.cli import data_inspect_view, jobs
from mhmoe_ray.cli.common import SPEC_SUFFIXES, AddressOption, JsonOption, out, print_json, read_spec

if TYPE_CHECKING:
    from mhmoe_ray.data.inspect.copies import DomainCopies
    from mhmoe_ray.data.inspect.figures import DomainSurvey, Figures
    from mhmoe_ray.data.inspect.lint import Problem
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
    """Paths of this machine that the cluster's nodes must see."""
    spec: "RunSpec | None"
    """Spec of the run; None for raw text."""
    manifest: "DataManifest | None"
    """Manifest of the prepared folder; None if there is none."""

    @property
    def tokenizer(self) -> Path | None:
        """Path of the prepared folder's tokenizer, else of the tokenizer that the spec gives; None without either."""
        return self.data.prepared / "tokenizer.json" if self.manifest else self.data.tokenizer


def what_is_meant(what: list[str], overrides: list[str]) -> What:
    """Return the data that a command's arguments mean: one spec, or raw text.

    Raises:
        SpecError: a spec is wrong, or it stands beside other arguments.
        DataError: the prepared data was made with other settings.
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
    """Return raw text as data, each path as a source that is named after its last part without a pattern."""
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
    """Survey all of the data in a job on the cluster.

    Args:
        what: the data to read.
        address: address of the cluster; None for the default.
        rules: whether to check texts against the rules of `lint`.

    Raises:
        MhmoeError: the job failed; this is the error that it logged.
    """
    from mhmoe_ray.cluster import remote
    from mhmoe_ray.data.inspect.result import SurveyRequest
    from mhmoe_ray.data.sources import find_files

    find_files(what.data)
    connection = jobs.cluster_for(what.cluster, what.needed, 1, address)
    request = SurveyRequest(data=what.data, tokenizer=what.tokenizer, rules=rules)
    job = remote.submit(connection, what.cluster.runtime_env, request)
    jobs.follow(job)
    return job.result(f"data of {what.name}")


QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}


def inspect(
    what: WhatArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    samples: Annotated[
        int, typer.Option(min=0, help="Show so many packed training samples as text, and read no raw text.")
    ] = 0,
    at: Annotated[int, typer.Option(min=0, help="The first of these samples, by its position in the training.")] = 0,
    address: AddressOption = None,
    json: JsonOption = False,
    png: Annotated[Path | None, typer.Option(help="Also draw lengths and fertility into this file.")] = None,
) -> None:
    """Read text on the cluster and show what is in it, by domain and by language.

    It counts documents, bytes, characters and words; tokens, with the tokenizer of the spec's prepared folder, else
    with data.tokenizer, and fertility; lengths; unreadable records; exact copies. Of prepared data it also shows the
    contents of the shards.
    """
    meant = what_is_meant(what, set_)
    if samples:
        _show_samples(meant, at, samples, json)
        return
    if png:
        pictures.check(png)
    found = {"name": meant.name, **as_dict(make(meant, address, rules=False)), "prepared": prepared(meant)}
    if png:
        from mhmoe_ray.cli.data_inspect_view import draw

        draw(found, png)
    if json:
        print_json(found)
        return
    data_inspect_view.show(found, held_out=meant.spec is not None)
    if png:
        out.print(f"drawn in {png}", soft_wrap=True)


def as_dict(found: "Survey") -> dict[str, Any]:
    """Return the survey as a whole, by domain (and within it by language), and by language."""
    from mhmoe_ray.data.inspect.figures import total

    languages: dict[str, list[Figures]] = {}
    for domain in found.domains.values():
        for language, figures in domain.languages.items():
            languages.setdefault(language, []).append(figures)
    copies = found.copies
    return {
        "tokenized": found.tokenized,
        "whole": {
            **_figures(total(figures for parts in languages.values() for figures in parts)),
            "distinct_texts": copies.distinct,
            "copies": copies.extra,
            "copied_bytes": copies.extra_bytes,
            "most_copied": [{"documents": n, "first": str(a), "second": str(b)} for n, a, b in copies.most],
            "shared_texts": dict(copies.pairs.most_common()),
        },
        "domains": {name: _domain(domain, copies.domains.get(name)) for name, domain in found.domains.items()},
        "languages": {name: _figures(total(parts)) for name, parts in sorted(languages.items())},
    }


def _domain(domain: "DomainSurvey", copies: "DomainCopies | None") -> dict[str, Any]:
    return {
        "files": domain.files,
        "stored_bytes": domain.stored_bytes,
        "damaged_files": domain.damaged,
        **_figures(domain.whole),
        "quarantined": dict(domain.quarantined),
        "dropped": dict(domain.dropped),
        "copies": copies.extra if copies else 0,
        "copied_bytes": copies.extra_bytes if copies else 0,
        "texts_elsewhere": copies.elsewhere if copies else 0,
        "languages": {name: _figures(figures) for name, figures in sorted(domain.languages.items())},
    }


def _figures(figures: "Figures") -> dict[str, Any]:
    """Return the figures for JSON; figures of tokens are null without a tokenizer."""
    from mhmoe_ray.data.inspect.figures import octaves, quantile

    def lengths(bins: dict[int, int]) -> dict[str, Any]:
        return {
            **{name: quantile(bins, share) for name, share in QUANTILES.items()},
            "octaves": octaves(bins),
        }

    tokens = figures.token_lengths
    return {
        "documents": figures.documents,
        "held_out": figures.held_out,
        "bytes": figures.bytes,
        "characters": figures.characters,
        "words": figures.words,
        "tokens": figures.tokens if tokens else None,
        "unknown_tokens": figures.unknown if tokens else None,
        "bytes_per_token": figures.bytes_per_token,
        "tokens_per_word": figures.tokens_per_word,
        "tokens_per_character": figures.tokens_per_character,
        "lengths_in_characters": lengths(figures.lengths),
        "lengths_in_tokens": lengths(tokens) if tokens else None,
        "longest": figures.longest,
        "longest_at": str(figures.longest_at) if figures.longest_at else None,
    }


def prepared(meant: What) -> dict[str, Any] | None:
    """Return the manifest of the prepared folder without its files; None if the data is not prepared."""
    if meant.manifest is None:
        return None
    whole = meant.manifest.model_dump(exclude={"recipe", "domains", "validation"})
    domains = {name: domain.model_dump(exclude={"shards"}) for name, domain in meant.manifest.domains.items()}
    return {"folder": str(meant.data.prepared), **whole, "domains": domains}


def _show_samples(meant: What, start: int, count: int, json: bool) -> None:
    from dataclasses import asdict

    from mhmoe_ray.data.inspect.samples import decoded

    if meant.spec is None:
        raise typer.BadParameter(f"--samples: {meant.name} is raw text, which has none; give a spec with prepared data")
    shown = decoded(meant.spec, start, count)
    if json:
        print_json([asdict(sample) for sample in shown])
        return
    for sample in shown:
        data_inspect_view.show_sample(sample)


WHERE = 5
"""Largest number of domains that are named for one problem."""


def lint(
    what: WhatArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    strict: Annotated[bool, typer.Option("--strict", help="Fail for warnings too.")] = False,
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Read text on the cluster and show what is wrong with it: where, and what to do.

    It looks for unreadable lines, files of unknown formats, damaged and foreign text, copies, domains that are too
    small or would be read too often, and unsuitable tokenizers. It ends with exit code 4 if there is an error.
    """
    from mhmoe_ray.data.inspect.lint import Data
    from mhmoe_ray.data.inspect.lint import lint as check
    from mhmoe_ray.errors import DataError

    meant = what_is_meant(what, set_)
    found = make(meant, address, rules=True)
    problems = check(Data(found, meant.data, meant.spec, meant.manifest))
    if json:
        print_json([asdict(problem) for problem in problems])
    else:
        documents = sum(domain.whole.documents for domain in found.domains.values())
        _show(problems)
        out.print(f"{_summary(problems)} in {documents:,} documents of {len(found.domains):,} domains")
    if any(problem.severe or strict for problem in problems):
        raise DataError(f"data of {meant.name}", _summary(problems), "mend them as it says above")


def _summary(problems: "list[Problem]") -> str:
    """Return the counts of errors and warnings as text ("2 errors and 3 warnings"); the same message in several domains
    counts once."""
    kinds = {(problem.severe, problem.rule, problem.says) for problem in problems}
    told = []
    for severe, name in ((True, "error"), (False, "warning")):
        if count := sum(kind[0] is severe for kind in kinds):
            told.append(f"{count} {name}" + ("s" if count > 1 else ""))
    return " and ".join(told) or "nothing wrong"


def _show(problems: "list[Problem]") -> None:
    """Print one block for each rule: the domains that it is about, by count, and a few examples."""
    order = sorted(problems, key=lambda p: (not p.severe, p.rule, p.says))
    for (severe, rule, says), group in groupby(order, key=lambda p: (p.severe, p.rule, p.says)):
        same = sorted(group, key=lambda p: -p.count)
        kind = "error" if severe else "warning"
        out.print(f"{kind} {rule}: {says}", style="bold red" if severe else "bold yellow", soft_wrap=True)
        named = ", ".join(f"{p.where} {p.count:,}" for p in same[:WHERE])
        more = f" and {len(same) - WHERE:,} more" if len(same) > WHERE else ""
        out.print(f"  in {named}{more}", soft_wrap=True)
        for place, saw in [example for p in same[:WHERE] for example in p.examples[: 1 if len(same) > 1 else 3]]:
            out.print(f"  {place}" + (f"  {saw}" if saw else ""), soft_wrap=True)
        out.print(f"  to do: {same[0].fix}\n", soft_wrap=True)
