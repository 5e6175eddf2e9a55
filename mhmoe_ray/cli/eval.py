"""`mhmoe eval`: the quality of a checkpoint.

The checkpoint is evaluated on the cluster, unless the run directory holds the evaluation already.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    print_untruncated,
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
    prior: "Prior | None" = None,
) -> "EvalRequest":
    """Return a request to evaluate a run's checkpoint on raw text and in tasks, or on held-out samples without either.

    The run's spec gives the batch size, the precision and the resources.

    Args:
        run: the run.
        checkpoint: name of the checkpoint; None picks the newest.
        text: folders, files or patterns of raw text; empty for none.
        overrides: overrides of data keys, by which the text is read.
        samples: largest number of samples of each domain of the text; None for the default.
        tasks: names of lm-eval's tasks; empty for none.
        task_folders: folders of the user's own tasks.
        limit: largest number of questions of each task; None for all.
        gpus: number of GPUs; None for as many as a worker of the training had.
        prior: prior probabilities of the domains of the text, for router `domain`; None if the domains are known.

    Raises:
        BadParameter: an option is given without the option that it belongs to, or for a model without it.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    from mhmoe_ray.cli.data_inspect import raw_text_target
    from mhmoe_ray.evaluate.request import EvalRequest
    from mhmoe_ray.spec import ClusterSpec

    if not text and (overrides or samples):
        raise typer.BadParameter("--set and --samples are about --text: name some")
    if not tasks and (limit or task_folders):
        raise typer.BadParameter("--limit and --task-folder are about --tasks: name some")
    # The weights need not be hashed here, because the job loads them and damage shows then.
    path, manifest = pick_checkpoint(run, checkpoint, verify_hashes=False)
    moe = manifest.model.moe
    if prior is not None and (moe is None or moe.router != "domain"):
        raise typer.BadParameter("--prior is for a model with router domain, and this model has no experts of domains")
    # An imported run has neither a spec nor held-out samples, so defaults replace the spec.
    spec = None if run.is_imported else run.spec()
    cluster = spec.cluster if spec else ClusterSpec()
    held_out = spec is not None and not text and not tasks
    return EvalRequest(
        run=str(run.path),
        checkpoint=path.name,
        prepared=str(spec.data.prepared) if spec and held_out else None,
        text=raw_text_target(text, overrides).data if text else None,
        samples=(samples or SAMPLES) if text else 0,
        tasks=tasks,
        task_folders=[str(folder.absolute()) for folder in task_folders],
        limit=limit,
        batch=spec.train.micro_batch_size if spec else 1,
        half=spec is not None and spec.train.precision == "bfloat16",
        cpus=cluster.cpus_per_worker,
        gpus=cluster.gpus_per_worker if gpus is None else gpus,
        prior=prior,
    )


def load_or_evaluate(run: "RunDir", request: "EvalRequest", recompute: bool, address: str | None) -> "Evaluation":
    """Return the evaluation of a request: the one that the run directory holds, else a new one by a job on the cluster.

    Args:
        run: the run.
        request: what to evaluate.
        recompute: whether to compute it even if the run directory holds it.
        address: address of the cluster; None for the default.

    Raises:
        RunError: the request names no text and no tasks, and the run has no held-out samples.
        DataError: the prepared data is missing.
        MhmoeError: the job failed; this is the error that it logged.
    """
    from mhmoe_ray.cluster import remote
    from mhmoe_ray.data.shards.manifest import require_data_manifest
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.evaluate.job import EvalJob
    from mhmoe_ray.evaluate.request import load_evaluation
    from mhmoe_ray.spec import ClusterSpec

    if not request.description:
        raise RunError(f"run {run.id}", "it was imported and has no held-out text", "give --text or --tasks")
    # The same request gives the same result, so a stored evaluation is used if there is one.
    if not recompute and (stored_evaluation := load_evaluation(run, request)):
        note.print(f"it was evaluated before, in {run.evaluations}; --again evaluates it again", soft_wrap=True)
        return stored_evaluation
    # This call raises an error if the prepared data is missing, before a cluster is started to read the data.
    if request.prepared:
        require_data_manifest(Path(request.prepared))
    section: ClusterSpec = ClusterSpec() if run.is_imported else run.spec().cluster
    required_paths = [run.path, *_local_paths(request)]
    connection = jobs.connect_to_cluster(section, required_paths, request.cpus, address)
    eval_job = EvalJob(request=request, can_grow=not connection.local)
    job = remote.submit(connection, section.runtime_env, eval_job)
    jobs.follow_job(job)
    return job.result(f"evaluation of {run.id}")


def _local_paths(request: "EvalRequest") -> list[Path]:
    """Return the file paths of the data and tasks that a request reads; URLs of object stores are left out."""
    paths = [request.prepared] if request.prepared else []
    paths += [source.path for source in request.text.sources.values()] if request.text else []
    # URLs of an object store need no check, because all nodes can reach it.
    return [Path(path) for path in (*paths, *request.task_folders) if "://" not in path]


TextOption = Annotated[
    list[str], typer.Option("--text", help="Raw text instead of the held-out samples: a folder, file or pattern.")
]
AgainOption = Annotated[
    bool, typer.Option("--again", help="Evaluate even if the run directory holds the result already.")
]
SamplesOption = Annotated[
    int | None, typer.Option(min=1, help=f"Samples of each domain of --text, at most; {SAMPLES} by default.")
]
TextSetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set a data key of a spec, by which --text is read.")
]
STANDARD_ERROR = "_stderr"
"""Part of the names that lm-eval gives to standard errors."""

GpusOption = Annotated[
    int | None,
    typer.Option(min=0, max=1, help="GPUs to compute on; by default as many as a worker of the training had."),
]


Prior = Literal["uniform", "updating", "cached"]
PriorOption = Annotated[
    Prior | None,
    typer.Option(
        help="With router domain: let all experts predict together, with these prior probabilities of the domains. By "
        "default the domain of each text is known."
    ),
]


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
    recompute: AgainOption = False,
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

    run_dir = find_run(run, storage)
    task_names = [task.strip() for task in tasks.split(",")] if tasks else []
    request = make_request(run_dir, checkpoint, text, set_, samples, task_names, task_folder, limit, gpus, prior)
    evaluation = load_or_evaluate(run_dir, request, recompute, address)
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
    if evaluation.tasks:
        print_untruncated(
            number_table(["", "questions", "measure", "value", "standard error"], _task_rows(evaluation.tasks))
        )


def _task_rows(tasks: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the rows of the table of tasks, one for each measure of each task, with its standard error."""
    rows = []
    for task, result in tasks.items():
        questions = f"{result['questions']:,}" if "questions" in result else "-"
        for name, value in result.items():
            if name == "questions" or STANDARD_ERROR in name:
                continue
            # lm-eval names a figure MEASURE,FILTER and its standard error MEASURE_stderr,FILTER.
            measure, comma, filter_name = name.partition(",")
            error = result.get(f"{measure}{STANDARD_ERROR}{comma}{filter_name}")
            error_text = "-" if error is None else f"{error:.4f}"
            rows.append([task, questions, name, f"{value:.4f}", error_text])
    return rows


def _figures_dict(evaluation: "Evaluation") -> dict[str, dict[str, dict[str, float | None]]]:
    figures = {
        "domains": {name: score.figures() for name, score in evaluation.domains.items()},
        "languages": {name: score.figures() for name, score in evaluation.languages.items()},
    }
    return {**figures, "total": {"all": evaluation.total_score.figures()}} if evaluation.domains else figures


def _print_scores(evaluation: "Evaluation") -> None:
    """Print the loss, perplexity and bits per byte of each domain and in total, then of each language."""

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
