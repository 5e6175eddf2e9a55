"""`mhmoe data inspect`: what is in raw text and, where that is prepared, in its shards."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray import pictures
from mhmoe_ray.cli import inspect_tables, survey
from mhmoe_ray.cli.common import AddressOption, JsonOption, out, print_json

if TYPE_CHECKING:
    from mhmoe_ray.data.inspect.copies import DomainCopies
    from mhmoe_ray.data.inspect.figures import DomainSurvey, Figures
    from mhmoe_ray.data.inspect.result import Survey


QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}


def inspect(
    what: survey.WhatArg,
    set_: survey.SetOption = [],  # noqa: B006 - typer needs the list
    samples: Annotated[
        int, typer.Option(min=0, help="Show so many packed training samples as text, and read no raw text.")
    ] = 0,
    at: Annotated[int, typer.Option(min=0, help="The first of these samples, by its position in the training.")] = 0,
    address: AddressOption = None,
    json: JsonOption = False,
    png: Annotated[Path | None, typer.Option(help="Also draw lengths and fertility into this file.")] = None,
) -> None:
    """Read text on the cluster and show what is in it, by domain and by language.

    Documents, bytes, characters, words; tokens and fertility with the tokenizer of the spec's prepared folder, else
    with data.tokenizer; lengths; what cannot be read; exact copies. Of prepared data also what the shards hold.
    """
    meant = survey.what_is_meant(what, set_)
    if samples:
        _show_samples(meant, at, samples, json)
        return
    if png:
        pictures.check(png)
    found = {"name": meant.name, **as_dict(survey.make(meant, address, rules=False)), "prepared": prepared(meant)}
    if png:
        from mhmoe_ray.cli.inspect_plot import draw

        draw(found, png)
    if json:
        print_json(found)
        return
    inspect_tables.show(found, held_out=meant.spec is not None)
    if png:
        out.print(f"drawn in {png}", soft_wrap=True)


def as_dict(found: "Survey") -> dict[str, Any]:
    """The survey in all, by domain (and in it by language), and by language."""
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
    """Token figures are null without a tokenizer."""
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


def prepared(meant: survey.What) -> dict[str, Any] | None:
    """What the manifest of the prepared folder says, but for its files."""
    if meant.manifest is None:
        return None
    whole = meant.manifest.model_dump(exclude={"recipe", "domains", "validation"})
    domains = {name: domain.model_dump(exclude={"shards"}) for name, domain in meant.manifest.domains.items()}
    return {"folder": str(meant.data.prepared), **whole, "domains": domains}


def _show_samples(meant: survey.What, start: int, count: int, json: bool) -> None:
    from dataclasses import asdict

    from mhmoe_ray.data.inspect.samples import decoded

    if meant.spec is None:
        raise typer.BadParameter(f"--samples: {meant.name} is raw text, which has none; give a spec with prepared data")
    shown = decoded(meant.spec, start, count)
    if json:
        print_json([asdict(sample) for sample in shown])
        return
    for sample in shown:
        inspect_tables.show_sample(sample)
