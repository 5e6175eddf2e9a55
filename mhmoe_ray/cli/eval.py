"""`mhmoe eval`: the quality of a checkpoint.

The checkpoint is evaluated on the cluster, unless the run directory holds the evaluation already.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.api.defaults import EVALUATION_SAMPLES, Prior
from mhmoe_ray.cli import jobs
from mhmoe_ray.cli.common import (
    STORAGE,
    AddressOption,
    CheckpointOption,
    JsonOption,
    RunArg,
    StorageOption,
    TrustOption,
    number_table,
    out,
    pick_checkpoint,
    print_json,
    print_note,
    print_untruncated,
)

if TYPE_CHECKING:
    from mhmoe_ray.api.evaluation import EvaluationOptions
    from mhmoe_ray.checkpoint.manifest import CheckpointManifest
    from mhmoe_ray.evaluate.request import Evaluation
    from mhmoe_ray.evaluate.score import Score
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.storage import Location


TextOption = Annotated[
    list[str], typer.Option("--text", help="Raw text instead of the held-out samples: a folder, file or pattern.")
]
AgainOption = Annotated[
    bool, typer.Option("--again", help="Evaluate even if the run directory holds the result already.")
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Samples of each domain of --text, at most; {EVALUATION_SAMPLES} by default. Of pictures, different "
        "images.",
    ),
]
TextSetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set a data key of a spec, by which --text is read.")
]
STANDARD_ERROR = "_stderr"
"""Part of a name by which lm-eval marks the standard error of a metric, as in `acc_stderr,none`."""

GpusOption = Annotated[
    int | None,
    typer.Option(min=0, max=1, help="GPUs to compute on; by default as many as a worker of the training had."),
]


PriorOption = Annotated[
    Prior | None,
    typer.Option(
        help="With router domain: let all experts predict together, with these prior probabilities of the domains. By "
        "default the domain of each text is known."
    ),
]


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


def pick_valid(
    run: "RunDir", checkpoint: str | None, options: "EvaluationOptions"
) -> "tuple[Location, CheckpointManifest]":
    """Return the checkpoint that the user names; options that are not for it or each other raise BadParameter."""
    mistake = options.mistake(OPTION_NAMES)
    if mistake is None:
        # The weights need not be hashed here, because the evaluation job verifies their hashes when it loads them.
        path, manifest = pick_checkpoint(run, checkpoint, verify_hashes=False)
        mistake = options.mistake_for(manifest.model, OPTION_NAMES)
    if mistake is not None:
        raise typer.BadParameter(": ".join(mistake))
    return path, manifest


def eval_(
    run: RunArg = None,
    text: TextOption = [],  # noqa: B006 - typer needs the list
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, separated by commas; `english` and `xnli` are the papers' lists."),
    ] = None,
    task_folder: Annotated[list[Path], typer.Option(help="Folder of your own tasks, as lm-eval reads them.")] = [],  # noqa: B006 - typer needs the list
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task, at most.")] = None,
    samples: SamplesOption = None,
    set_: TextSetOption = [],  # noqa: B006 - typer needs the list
    checkpoint: CheckpointOption = None,
    gpus: GpusOption = None,
    prior: PriorOption = None,
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="PICTURES",
            help="For an encoder: classify the pictures of --text, whose captions are classes, by a linear probe that "
            "is trained on these pictures; --samples bounds both.",
        ),
    ] = None,
    recompute: AgainOption = False,
    storage: StorageOption = STORAGE,
    address: AddressOption = None,
    trust_run: TrustOption = False,
    json: JsonOption = False,
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
    from mhmoe_ray.api.evaluation import EvaluationOptions, load_or_evaluate
    from mhmoe_ray.runs.directory import find_run

    run_dir = find_run(run, storage)
    options = EvaluationOptions(
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
    path, _ = pick_valid(run_dir, checkpoint, options)
    request = options.request(run_dir, path.name)
    evaluation = load_or_evaluate(
        run_dir, request, recompute, address, follow=jobs.follow_job, trust_run=trust_run, on_note=print_note
    )
    if json:
        # The routing is left out, because `mhmoe routing` shows it.
        print_json({**evaluation.model_dump(exclude={"routing"}), "figures": _figures_dict(evaluation)})
        return
    out.print(
        f"{run_dir.id}, {request.checkpoint}, {evaluation.tokens:,} tokens trained: {request.description}",
        soft_wrap=True,
    )
    if evaluation.domains:
        _print_scores(evaluation)
    for figure_table in evaluation.family_figures.tables() if evaluation.family_figures else ():
        print_untruncated(number_table(figure_table.columns, figure_table.rows))
        for line in figure_table.lines:
            out.print(line, soft_wrap=True)
    if evaluation.tasks:
        print_untruncated(
            number_table(["", "questions", "measure", "value", "standard error"], _task_rows(evaluation.tasks))
        )


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
            error_text = "-" if error is None else f"{error:.4f}"
            rows.append([task, questions, name, f"{value:.4f}", error_text])
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
        perplexity = "not finite" if score.perplexity is None else f"{score.perplexity:.2f}"
        bits = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        figures = [f"{score.loss:.4f}", perplexity, bits]
        return [name, *figures, f"{score.tokens:,}", f"{score.text_bytes:,}"]

    columns = ["", "loss", "perplexity", "bits/byte", "tokens", "bytes"]
    rows = [row(name, score) for name, score in evaluation.domains.items()]
    rows += [row("all", evaluation.total_score)]
    print_untruncated(number_table(columns, rows))
    if evaluation.languages:
        out.print()
        print_untruncated(number_table(columns, [row(name, score) for name, score in evaluation.languages.items()]))
