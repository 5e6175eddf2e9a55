"""`mhmoe eval`: the quality of a checkpoint.

The checkpoint is evaluated on the cluster, unless the run directory holds the evaluation already.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli import options
from mhmoe_ray.cli.formats import format_figure
from mhmoe_ray.cli.output import follow_job, out, print_json, print_line, print_note, print_table, show_activity

if TYPE_CHECKING:
    from mhmoe_ray.evaluate.request import Evaluation
    from mhmoe_ray.evaluate.score import Score
    from mhmoe_ray.runs.directory import RunDir


STANDARD_ERROR = "_stderr"
"""Part of a name by which lm-eval marks the standard error of a metric, as in `acc_stderr,none`."""

OPTION_NAMES = {
    "text": "--text",
    "overrides": "--set",
    "samples": "--samples",
    "tasks": "--tasks",
    "task_folders": "--task-folder",
    "limit": "--limit",
    "gpus": "--gpus",
    "prior": "--prior",
    "probe": "--probe",
}
"""Options of the commands by the field of `EvaluationOptions` that they set."""


def evaluate(
    run: "RunDir",
    checkpoint: str | None,
    recompute: bool,
    address: str | None,
    trust_run: bool = False,
    **fields: Any,
) -> "Evaluation":
    """Evaluate a checkpoint as `api.evaluation.evaluate` does, and follow the job; `fields` are `EvaluationOptions`."""
    from mhmoe_ray.api import evaluation

    try:
        return evaluation.evaluate(
            run,
            checkpoint,
            evaluation.EvaluationOptions(**fields),
            recompute,
            address,
            option_names=OPTION_NAMES,
            follow=follow_job,
            trust_run=trust_run,
            on_note=print_note,
        )
    except evaluation.EvaluationOptionsError as e:
        raise typer.BadParameter(f"{e.reason}: {e.fix}") from e


def eval_(
    run: options.RunArg = None,
    text: options.TextOption = [],  # noqa: B006 - typer needs the list
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, separated by commas; `english` and `xnli` are the papers' lists."),
    ] = None,
    task_folder: Annotated[list[Path], typer.Option(help="Folder of your own tasks, as lm-eval reads them.")] = [],  # noqa: B006 - typer needs the list
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task, at most.")] = None,
    samples: options.SamplesOption = None,
    set_: options.TextSetOption = [],  # noqa: B006 - typer needs the list
    checkpoint: options.CheckpointOption = None,
    gpus: options.GpusOption = None,
    prior: options.PriorOption = None,
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGES",
            help="For an encoder: classify the images of --text, whose captions are classes, by a linear probe that "
            "is trained on these images; --samples bounds both.",
        ),
    ] = None,
    recompute: options.AgainOption = False,
    storage: options.StorageOption = options.STORAGE,
    address: options.AddressOption = None,
    trust_run: options.TrustOption = False,
    json: options.JsonOption = False,
) -> None:
    """Show loss, perplexity and bits per byte of a run's checkpoint, by domain and language, on its held-out text or
    any other text; or its scores in lm-eval's tasks.

    For an encoder, it shows the losses on held-out samples, and the value of the image, which is how much better hidden
    tokens of captions are predicted with their own image than with another image or none. It also shows the scores of
    retrieval and of captions if the encoder learned them. With --probe, it shows only the accuracy of a linear probe.
    For a vision model, it shows the losses of its tasks, the accuracy of classes, and COCO's average precision of
    objects.

    The result stays in the run directory. Routing is dropless, as in serving. For example `mhmoe eval --text books/
    --samples 100`, or `mhmoe eval --tasks english --limit 200`.
    """
    show_activity("looking for the checkpoint")
    from mhmoe_ray.checkpoint.find import split_step
    from mhmoe_ray.runs.directory import find_run

    run, checkpoint = split_step(run, checkpoint)
    run_dir = find_run(run, storage)
    evaluation = evaluate(
        run_dir,
        checkpoint,
        recompute,
        address,
        trust_run,
        text=text,
        overrides=set_,
        samples=samples,
        tasks=[task.strip() for task in tasks.split(",")] if tasks else (),
        task_folders=task_folder,
        limit=limit,
        gpus=gpus,
        prior=prior,
        probe=probe,
    )
    if json:
        # The routing is left out, because `mhmoe routing` shows it.
        print_json({**evaluation.model_dump(exclude={"routing"}), "figures": _figures_dict(evaluation)})
        return
    request = evaluation.request
    print_line(f"{run_dir.id}, {request.checkpoint}, {evaluation.tokens:,} tokens trained: {request.description}")
    if evaluation.domains:
        _print_scores(evaluation)
    for figure_table in evaluation.family_figures.tables() if evaluation.family_figures else ():
        print_table(figure_table.columns, figure_table.rows)
        for line in figure_table.lines:
            print_line(line)
    if evaluation.tasks:
        print_table(["", "questions", "measure", "value", "standard error"], _task_rows(evaluation.tasks))


def _task_rows(tasks: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for task, result in tasks.items():
        questions = f"{result['questions']:,}" if "questions" in result else "-"
        for name, value in result.items():
            if name == "questions" or STANDARD_ERROR in name:
                continue
            # lm-eval names a metric MEASURE,FILTER and its standard error MEASURE_stderr,FILTER.
            measure, comma, filter_name = name.partition(",")
            error = result.get(f"{measure}{STANDARD_ERROR}{comma}{filter_name}")
            rows.append([task, questions, name, f"{value:.4f}", format_figure(error, ".4f", "-")])
    return rows


def _figures_dict(evaluation: "Evaluation") -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {
        "domains": {name: score.figures() for name, score in evaluation.domains.items()},
        "languages": {name: score.figures() for name, score in evaluation.languages.items()},
    }
    if evaluation.family_figures is not None:
        figures |= evaluation.family_figures.derived()
    return {**figures, "total": {"all": evaluation.total_score.figures()}} if evaluation.domains else figures


def _print_scores(evaluation: "Evaluation") -> None:
    def row(name: str, score: "Score") -> list[str]:
        perplexity, bits = format_figure(score.perplexity, ".2f"), format_figure(score.bits_per_byte, ".4f", "-")
        return [name, f"{score.loss:.4f}", perplexity, bits, f"{score.tokens:,}", f"{score.text_bytes:,}"]

    columns = ["", "loss", "perplexity", "bits/byte", "tokens", "bytes"]
    rows = [row(name, score) for name, score in evaluation.domains.items()]
    rows += [row("all", evaluation.total_score)]
    print_table(columns, rows)
    if evaluation.languages:
        out.print()
        print_table(columns, [row(name, score) for name, score in evaluation.languages.items()])
