"""`mhmoe eval`: what a checkpoint knows."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli.common import (
    AddressOption,
    CheckpointOption,
    JsonOption,
    RunArg,
    StorageOption,
    number_table,
    out,
    print_json,
    print_whole,
)
from mhmoe_ray.cli.complete import STORAGE
from mhmoe_ray.cli.evaluating import SAMPLES, evaluation_of, make_request

if TYPE_CHECKING:
    from mhmoe_ray.evaluate.request import Evaluation, Score


TextOption = Annotated[
    list[str], typer.Option("--text", help="Raw text instead of the held-out samples: a folder, file or pattern.")
]
AgainOption = Annotated[bool, typer.Option("--again", help="Also if the run directory has the answer already.")]
SamplesOption = Annotated[
    int | None, typer.Option(min=1, help=f"Of each domain of --text, at most; {SAMPLES} by default.")
]
TextSetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="How --text is read, as data keys of a spec.")
]
STDERR = "_stderr"
"""As lm-eval calls standard errors."""

GpusOption = Annotated[
    int | None, typer.Option(min=0, max=1, help="To compute on; by default as many as a worker of the training had.")
]


def eval_(
    run: RunArg = None,
    text: TextOption = [],  # noqa: B006 - typer needs the list
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, by commas; `english` and `xnli` are the papers' lists.")
    ] = None,
    task_folder: Annotated[list[Path], typer.Option(help="With tasks of your own, as lm-eval reads them.")] = [],  # noqa: B006 - typer needs the list
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task, at most.")] = None,
    samples: SamplesOption = None,
    set_: TextSetOption = [],  # noqa: B006 - typer needs the list
    checkpoint: CheckpointOption = None,
    gpus: GpusOption = None,
    again: AgainOption = False,
    storage: StorageOption = STORAGE,
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Loss, perplexity and bits per byte of a run's checkpoint, by domain and language, on its held-out text or any
    other; or its scores in lm-eval's tasks. The answer stays in the run directory.

    Routing is dropless, as in serving. For example `mhmoe eval --text books/ --samples 100`, or `mhmoe eval --tasks
    english --limit 200`.
    """
    from mhmoe_ray.runs.directory import find_run

    found = find_run(run, storage)
    named = [task.strip() for task in tasks.split(",")] if tasks else []
    request = make_request(found, checkpoint, text, set_, samples, named, task_folder, limit, gpus)
    evaluation = evaluation_of(found, request, again, address)
    if json:
        print_json({**evaluation.model_dump(exclude={"routing"}), "figures": _figures(evaluation)})
        return
    out.print(f"{found.id}, {request.checkpoint}, {evaluation.tokens:,} tokens trained: {request.said}", soft_wrap=True)
    if evaluation.domains:
        _show_scores(evaluation)
    if evaluation.tasks:
        print_whole(number_table(["", "questions", "measure", "value", "standard error"], _task_rows(evaluation.tasks)))


def _task_rows(tasks: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for task, result in tasks.items():
        questions = f"{result['questions']:,}" if "questions" in result else "-"
        for name, value in result.items():
            if name == "questions" or STDERR in name:
                continue
            measure, comma, filtered = name.partition(",")
            error = result.get(f"{measure}{STDERR}{comma}{filtered}")
            told = "-" if error is None else f"{error:.4f}"
            rows.append([task, questions, name, f"{value:.4f}", told])
    return rows


def _figures(evaluation: "Evaluation") -> dict[str, dict[str, dict[str, float | None]]]:
    found = {
        "domains": {name: score.figures() for name, score in evaluation.domains.items()},
        "languages": {name: score.figures() for name, score in evaluation.languages.items()},
    }
    return {**found, "total": {"all": evaluation.total.figures()}} if evaluation.domains else found


def _show_scores(evaluation: "Evaluation") -> None:
    def row(name: str, score: "Score") -> list[str]:
        perplexity = "not finite" if score.perplexity is None else f"{score.perplexity:.2f}"
        bits = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        figures = [f"{score.loss:.4f}", perplexity, bits]
        return [name, *figures, f"{score.tokens:,}", f"{score.text_bytes:,}"]

    columns = ["", "loss", "perplexity", "bits/byte", "tokens", "bytes"]
    rows = [row(name, score) for name, score in evaluation.domains.items()]
    rows += [row("all", evaluation.total)]
    print_whole(number_table(columns, rows))
    if evaluation.languages:
        out.print()
        print_whole(number_table(columns, [row(name, score) for name, score in evaluation.languages.items()]))
