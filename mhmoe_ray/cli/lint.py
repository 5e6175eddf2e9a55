"""`mhmoe data lint`: what is wrong with text, where, and what to do."""

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli import survey
from mhmoe_ray.cli.common import AddressOption, JsonOption, out, print_json

if TYPE_CHECKING:
    from mhmoe_ray.data.inspect.lint import Problem

WHERE = 5
"""Domains that are named of a problem, at most."""


def lint(
    what: survey.WhatArg,
    set_: survey.SetOption = [],  # noqa: B006 - typer needs the list
    strict: Annotated[bool, typer.Option("--strict", help="Fail for warnings too.")] = False,
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Read text on the cluster and say what is wrong with it: where, and what to do.

    Unreadable lines, files that no format takes, damaged and foreign text, copies, domains that are too small or would
    be read too often, tokenizers that do not suit. Ends with exit code 4 if there is an error.
    """
    from mhmoe_ray.data.inspect.lint import Data
    from mhmoe_ray.data.inspect.lint import lint as check
    from mhmoe_ray.errors import DataError

    meant = survey.what_is_meant(what, set_)
    found = survey.make(meant, address, rules=True)
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
    """2 errors and 3 warnings: by what they say, however many domains they are in."""
    kinds = {(problem.severe, problem.rule, problem.says) for problem in problems}
    told = []
    for severe, name in ((True, "error"), (False, "warning")):
        if count := sum(kind[0] is severe for kind in kinds):
            told.append(f"{count} {name}" + ("s" if count > 1 else ""))
    return " and ".join(told) or "nothing wrong"


def _show(problems: "list[Problem]") -> None:
    """One block a rule, the domains it is about by count, and a few examples."""
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
