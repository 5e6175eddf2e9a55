"""Evaluation of a model on tasks of EleutherAI's lm-eval, through its Python interface (extra `eval`)."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhmoe_ray.errors import SpecError

# Tasks of the first MH-MoE paper (arXiv 2404.15045), under lm-eval's names: the languages are those of its table 3, the
# English tasks those of its table 2.
XNLI_LANGUAGES = ("bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
PAPER_TASKS = {
    "english": [
        "arc_challenge",
        "arc_easy",
        "rte",
        "openbookqa",
        "winogrande",
        "piqa",
        "boolq",
        "hellaswag",
        "truthfulqa_mc1",
        "truthfulqa_mc2",
    ],
    "xnli": [f"xnli_{code}" for code in XNLI_LANGUAGES],
}


def expand_tasks(tasks: Sequence[str]) -> list[str]:
    """Return lm-eval's task names; `english` and `xnli` stand for those of the first MH-MoE paper."""
    return [name for task in tasks for name in PAPER_TASKS.get(task, [task])]


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    task_folders: Sequence[str],
    *,
    batch_size: int,
    use_bfloat16: bool,
    device: str,
    question_limit: int | None,
) -> dict[str, dict[str, Any]]:
    """Evaluate an exported model on tasks of lm-eval and return the metrics by task, with standard errors.

    `task_folders` have further tasks, and `question_limit` is that of each task, whose number of questions is the
    metric `questions`. A missing lm-eval or an unknown task is a SpecError.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        fix = "install mhmoe-ray[eval] there, or leave out the tasks"
        raise SpecError("tasks", f"lm-eval is not installed where it would run ({e})", fix) from e
    task_manager = TaskManager(include_path=[str(Path(f)) for f in task_folders] or None)
    if unknown_tasks := [task for task in tasks if task not in task_manager.all_tasks]:
        raise SpecError(f"task {unknown_tasks[0]}", "lm-eval has no task of this name", "see `lm-eval ls tasks`")
    # For a bootstrapped standard error lm-eval would start a process for every core of the machine, although fewer CPUs
    # may be reserved for this process.
    os.environ["DISABLE_MULTIPROC"] = "1"
    dtype = "bfloat16" if use_bfloat16 else "auto"
    evaluation = simple_evaluate(
        model=HFLM(pretrained=str(folder), dtype=dtype, device=device, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=task_manager,
        limit=question_limit,
        bootstrap_iters=100,
        verbosity="ERROR",
    )
    question_counts = {task: sample_counts["effective"] for task, sample_counts in evaluation["n-samples"].items()}
    return {task: _finite_metrics(result, question_counts.get(task)) for task, result in evaluation["results"].items()}


def _finite_metrics(result: dict[str, Any], question_count: int | None) -> dict[str, Any]:
    """Return the finite numbers in lm-eval's result of one task, with names such as `acc,none` shortened to `acc`.

    `question_count` is None for a group of tasks, whose questions lm-eval does not count.
    """
    # Releases of lm-eval name the number of questions differently, so both names are dropped.
    numbers = {name: v for name, v in result.items() if isinstance(v, int | float) and math.isfinite(v)}
    metrics = {name.removesuffix(",none"): v for name, v in numbers.items() if name not in ("sample_len", "samples")}
    return metrics if question_count is None else {"questions": question_count, **metrics}
