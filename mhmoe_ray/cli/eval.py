"""`mhmoe eval`: show the quality of a checkpoint.

The checkpoint is evaluated on the cluster, unless the run directory holds the evaluation already.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli import jobs
from mhmoe_ray.cli.common import (
    STORAGE,
    AddressOption,
    CheckpointOption,
    JsonOption,
    RunArg,
    StorageOption,
    note,
    number_table,
    out,
    pick_checkpoint,
    print_json,
    print_whole,
)

if TYPE_CHECKING:
    from mhmoe_ray.evaluate.request import EvalRequest, Evaluation
    from mhmoe_ray.evaluate.score import Score
    from mhmoe_ray.runs.directory import RunDir


SAMPLES = 512
"""Largest number of samples of each domain of raw text."""


def make_request(
    run: "RunDir",
    checkpoint: str | None,
    text: list[str],
    overrides: list[str],
    samples: int | None,
    tasks: list[str],
    task_folders: list[Path],
    limit: int | None,
    gpus: int | None,
) -> "EvalRequest":
    """Return the request: for raw text if some is named, else for the held-out samples unless tasks are named, and for
    tasks.

    The run's spec gives the batch size, the precision and the resources.

    Raises:
        BadParameter: an option is given without the option that it belongs to.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    from mhmoe_ray.cli.data_inspect import raw_text
    from mhmoe_ray.evaluate.request import EvalRequest
    from mhmoe_ray.spec import ClusterSpec

    if not text and (overrides or samples):
        raise typer.BadParameter("--set and --samples are about --text: name some")
    if not tasks and (limit or task_folders):
        raise typer.BadParameter("--limit and --task-folder are about --tasks: name some")
    path, _ = pick_checkpoint(run, checkpoint, hashed=False)
    spec = None if run.is_imported else run.spec()
    cluster = spec.cluster if spec else ClusterSpec()
    held_out = spec is not None and not text and not tasks
    return EvalRequest(
        run=str(run.path),
        checkpoint=path.name,
        prepared=str(spec.data.prepared) if spec and held_out else None,
        text=raw_text(text, overrides).data if text else None,
        samples=(samples or SAMPLES) if text else 0,
        tasks=tasks,
        task_folders=[str(folder.absolute()) for folder in task_folders],
        limit=limit,
        batch=spec.train.micro_batch_size if spec else 1,
        half=spec is not None and spec.train.precision == "bfloat16",
        cpus=cluster.cpus_per_worker,
        gpus=cluster.gpus_per_worker if gpus is None else gpus,
    )


def evaluation_of(run: "RunDir", request: "EvalRequest", again: bool, address: str | None) -> "Evaluation":
    """Return the evaluation that the run directory holds, or compute it on the cluster now.

    Args:
        run: the run.
        request: what to evaluate.
        again: compute it even if the run directory holds it.
        address: address of the cluster; None for the default.

    Raises:
        RunError: there is nothing to evaluate.
        DataError, CheckpointError, SpecError, JobError: the job failed; this is the error that it logged.
    """
    from mhmoe_ray.cluster import remote
    from mhmoe_ray.data.shards.manifest import require_data_manifest
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.evaluate.job import EvalJob
    from mhmoe_ray.evaluate.request import stored
    from mhmoe_ray.spec import ClusterSpec

    if not request.said:
        raise RunError(f"run {run.id}", "it was imported and has no held-out text", "give --text or --tasks")
    if not again and (found := stored(run, request)):
        note.print(f"as evaluated before, in {run.evaluations}; --again does it anew", soft_wrap=True)
        return found
    if request.prepared:
        require_data_manifest(Path(request.prepared))
    section: ClusterSpec = ClusterSpec() if run.is_imported else run.spec().cluster
    needed = [run.path, *_local(request)]
    connection = jobs.cluster_for(section, needed, request.cpus, address)
    asked = EvalJob(request=request, can_grow=not connection.local)
    job = remote.submit(connection, section.runtime_env, asked)
    jobs.follow(job)
    return job.result(f"evaluation of {run.id}")


def _local(request: "EvalRequest") -> list[Path]:
    """Return the paths on this machine that the request reads."""
    named = [request.prepared] if request.prepared else []
    named += [source.path for source in request.text.sources.values()] if request.text else []
    return [Path(path) for path in (*named, *request.task_folders) if "://" not in path]


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
"""Part of lm-eval's name of a figure by which a standard error is recognised."""

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
    """Show loss, perplexity and bits per byte of a run's checkpoint, by domain and language, on its held-out text or
    any other text; or its scores in lm-eval's tasks.

    The result stays in the run directory. Routing is dropless, as in serving. For example `mhmoe eval --text books/
    --samples 100`, or `mhmoe eval --tasks english --limit 200`.
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
