"""`mhmoe data inspect` shows the contents of raw text and its shards; `mhmoe data lint` shows the problems in it.

Both run a job on the cluster that reads all text and returns a survey: counts, lengths, copies and problems.
"""

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray import plotting
from mhmoe_ray.cli import data_inspect_view, options
from mhmoe_ray.cli.output import follow_job, out, print_json, print_line, print_note, show_activity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhmoe_ray.api.survey import SurveyTarget
    from mhmoe_ray.data.inspect.copies import DomainCopies
    from mhmoe_ray.data.inspect.figures import DomainSurvey, Figures, ImageFigures
    from mhmoe_ray.data.inspect.lint import Problem
    from mhmoe_ray.data.inspect.result import Survey


DataArg = Annotated[
    list[str],
    typer.Argument(help="A spec (.yaml); or folders, files or patterns of raw text.", show_default=False),
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec; for raw text, of data or cluster."),
]


QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}
"""Quantiles of document lengths that the tables show, from 0 to 1, by column title."""


def inspect(
    data: DataArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    samples: Annotated[
        int, typer.Option(min=0, help="Show this many packed training samples as text, and read no raw text.")
    ] = 0,
    first_position: Annotated[
        int, typer.Option("--at", min=0, help="Position of the first of these samples in the training.")
    ] = 0,
    address: options.AddressOption = None,
    json: options.JsonOption = False,
    png: Annotated[Path | None, typer.Option(help="Also draw lengths and fertility into this file.")] = None,
) -> None:
    """Read text on the cluster and show its contents, by domain and by language.

    It counts documents, bytes, characters, words, images, unreadable records and exact copies, and shows the lengths of
    documents and the sizes of images. With a tokenizer (that of the spec's prepared folder, else data.tokenizer) it
    also counts tokens and shows fertility: tokens per word and per character. Of prepared data it also shows the
    contents of the shards.
    """
    show_activity("looking for the data")
    from mhmoe_ray.api.survey import survey, survey_target

    target = survey_target(data, set_)
    # Packed samples are read here from the prepared folder, so no job is needed.
    if samples:
        _print_samples(target, first_position, samples, json)
        return
    # This call raises an error if the plot cannot be written, before all text is read, which may take long.
    if png:
        plotting.check(png)
    summary = {
        "name": target.name,
        **survey_dict(survey(target, address, check_rules=False, follow=follow_job, on_note=print_note)),
        "prepared": target.prepared_as_json(),
    }
    if png:
        data_inspect_view.draw_survey(summary, png)
    if json:
        print_json(summary)
        return
    data_inspect_view.print_survey(summary, held_out=target.spec is not None)
    if png:
        print_line(f"drawn in {png}")


def survey_dict(survey: "Survey") -> dict[str, Any]:
    """Return a survey of raw text as JSON data: in total, by domain (each also by language), and by language."""
    from mhmoe_ray.data.inspect.figures import sum_figures

    languages: dict[str, list[Figures]] = {}
    for domain in survey.domains.values():
        for language, figures in domain.languages.items():
            languages.setdefault(language, []).append(figures)
    copies = survey.copies
    return {
        "tokenized": survey.tokenized,
        "whole": {
            **_figures_dict(sum_figures(figures for parts in languages.values() for figures in parts)),
            "distinct_texts": copies.distinct,
            "copies": copies.extra,
            "copied_bytes": copies.extra_bytes,
            "most_copied": [{"documents": n, "first": str(a), "second": str(b)} for n, a, b in copies.most_copied],
            "shared_texts": dict(copies.pairs.most_common()),
        },
        "domains": {name: _domain_dict(domain, copies.domains.get(name)) for name, domain in survey.domains.items()},
        "languages": {name: _figures_dict(sum_figures(parts)) for name, parts in sorted(languages.items())},
    }


def _domain_dict(domain: "DomainSurvey", copies: "DomainCopies | None") -> dict[str, Any]:
    return {
        "files": domain.files,
        "stored_bytes": domain.stored_bytes,
        "damaged_files": domain.damaged,
        **_figures_dict(domain.all_figures),
        "quarantined": dict(domain.quarantined),
        "dropped": dict(domain.dropped),
        "copies": copies.extra if copies else 0,
        "copied_bytes": copies.extra_bytes if copies else 0,
        "texts_elsewhere": copies.shared_texts if copies else 0,
        "languages": {name: _figures_dict(figures) for name, figures in sorted(domain.languages.items())},
    }


def _figures_dict(figures: "Figures") -> dict[str, Any]:
    """Return the counts and lengths of documents as JSON data; those in tokens are null without a tokenizer."""
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
        "lengths_in_characters": _distribution(figures.lengths),
        "lengths_in_tokens": _distribution(tokens) if tokens else None,
        "longest": figures.longest,
        "longest_at": str(figures.longest_at) if figures.longest_at else None,
        **({"images": _images_dict(figures.images)} if figures.images.images else {}),
    }


def _distribution(bins: "Mapping[int, int]") -> dict[str, Any]:
    """Return the quantiles and the counts by octave of a histogram."""
    from mhmoe_ray.data.inspect.figures import octave_counts, quantile

    return {**{name: quantile(bins, share) for name, share in QUANTILES.items()}, "octaves": octave_counts(bins)}


def _images_dict(figures: "ImageFigures") -> dict[str, Any]:
    annotations: dict[str, Any] = {}
    if figures.classes:
        annotations["classes"] = dict(sorted(figures.classes.items()))
    if figures.objects:
        annotations["objects_per_image"] = _distribution(figures.objects)
    return {
        "images": figures.images,
        "bytes": figures.bytes,
        "shorter_sides": _distribution(figures.sides),
        "aspect_ratios": {f"{2**ratio:.2f}": count for ratio, count in sorted(figures.aspect_ratios.items())},
        "extreme_aspect_ratios": figures.extreme,
        # `annotations` has entries only for sources of vision models, because no others have classes or objects.
        **annotations,
    }


def _print_samples(target: "SurveyTarget", start: int, count: int, json: bool) -> None:
    """Print `count` packed training samples from position `start` of the training on, as text or JSON."""
    from mhmoe_ray.data.inspect.samples import decode_samples
    from mhmoe_ray.errors import SpecError

    if target.spec is None:
        raise typer.BadParameter(
            f"--samples: {target.name} is raw text, which has no packed samples; give a spec with prepared data"
        )
    if not target.spec.model.family.predicts_next_token:
        reason = f"--samples shows texts of a decoder, and this is {target.spec.model.family.title}"
        raise SpecError(f"spec {target.name}", reason, "leave it out")
    samples = decode_samples(target.spec, range(start, start + count), target.samples_before)
    if json:
        print_json([asdict(sample) for sample in samples])
        return
    for sample in samples:
        data_inspect_view.print_sample(sample)


MAX_DOMAINS = 5
"""Largest number of domains that are listed for one problem."""


def lint(
    data: DataArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    strict: Annotated[bool, typer.Option("--strict", help="Fail for warnings too.")] = False,
    address: options.AddressOption = None,
    json: options.JsonOption = False,
) -> None:
    """Read text on the cluster and show its problems, where they are, and what to do.

    It looks for unreadable lines, files of unknown formats, damaged and foreign text, copies, domains that are too
    small or would be read too often, and unsuitable tokenizers. The exit code is 4 if there is an error.
    """
    show_activity("looking for the data")
    from mhmoe_ray.api.survey import survey, survey_target
    from mhmoe_ray.data.inspect.lint import LintInput
    from mhmoe_ray.data.inspect.lint import lint as check
    from mhmoe_ray.errors import DataError

    target = survey_target(data, set_)
    text_survey = survey(target, address, check_rules=True, follow=follow_job, on_note=print_note)
    inputs = LintInput(text_survey, target.data, target.spec, target.manifest, target.samples_before or {})
    problems = check(inputs)
    if json:
        print_json([problem.as_json() for problem in problems])
    else:
        documents = sum(domain.all_figures.documents for domain in text_survey.domains.values())
        _print_problems(problems)
        out.print(f"{_format_summary(problems)} in {documents:,} documents of {len(text_survey.domains):,} domains")
    if any(problem.severe or strict for problem in problems):
        raise DataError(f"data of {target.name}", _format_summary(problems), "fix them as described above")


def _format_summary(problems: "list[Problem]") -> str:
    """Return the numbers of errors and warnings as text; the same message in several domains counts once."""
    kinds = {(problem.severe, problem.rule, problem.message) for problem in problems}
    parts = []
    for severe, name in ((True, "error"), (False, "warning")):
        if count := sum(kind[0] is severe for kind in kinds):
            parts.append(f"{count} {name}" + ("s" if count > 1 else ""))
    return " and ".join(parts) or "no problems"


def _print_problems(problems: "list[Problem]") -> None:
    # `groupby` needs equal keys side by side, so the problems are sorted by them. Errors come before warnings.
    sorted_problems = sorted(problems, key=lambda p: (not p.severe, p.rule, p.message))
    for (severe, rule, message), group in groupby(sorted_problems, key=lambda p: (p.severe, p.rule, p.message)):
        rule_problems = sorted(group, key=lambda p: -p.count)
        kind = "error" if severe else "warning"
        out.print(f"{kind} {rule}: {message}", style="bold red" if severe else "bold yellow", soft_wrap=True)
        domains = ", ".join(f"{p.subject} {p.count:,}" for p in rule_problems[:MAX_DOMAINS])
        ellipsis = f" and {len(rule_problems) - MAX_DOMAINS:,} more" if len(rule_problems) > MAX_DOMAINS else ""
        print_line(f"  in {domains}{ellipsis}")
        # If the problem is in several domains, one example from each of them is enough.
        for location, excerpt in [
            example for p in rule_problems[:MAX_DOMAINS] for example in p.examples[: 1 if len(rule_problems) > 1 else 3]
        ]:
            print_line(f"  {location}" + (f"  {excerpt}" if excerpt else ""))
        print_line(f"  to do: {rule_problems[0].fix}\n")
