"""Evaluation of a model on tasks of EleutherAI's lm-eval, through its Python interface (extra `eval`)."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer import boundaries
from mhmoe_ray.errors import SpecError
from mhmoe_ray.model.decoder import Decoder, token_losses

# Tasks of the first paper, under lm-eval's names: the languages are those of its table 3, the English tasks those of
# its table 2.
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
    """Return the names of lm-eval's tasks, with `english` and `xnli` replaced by the first paper's tasks."""
    return [name for task in tasks for name in PAPER_TASKS.get(task, [task])]


def run_tasks(
    model: Decoder,
    tokenizer: Tokenizer,
    seq_len: int,
    tasks: Sequence[str],
    task_folders: Sequence[str],
    *,
    batch_size: int,
    use_bfloat16: bool,
    question_limit: int | None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model on tasks of lm-eval and return the metrics by task, with standard errors where there are any.

    The number of questions of a task is in its metric `questions`.

    Args:
        model: the model, in evaluation mode.
        tokenizer: the model's tokenizer, which has tokens for the start and end of a document.
        seq_len: number of tokens that the model sees at once.
        tasks: names of lm-eval's tasks.
        task_folders: folders with tasks that lm-eval does not have itself.
        batch_size: number of sequences per forward pass.
        use_bfloat16: True to compute matrix products in bfloat16.
        question_limit: largest number of questions of each task; None asks all.

    Raises:
        SpecError: lm-eval is not installed or has no task of a name, or a task needs generated text.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        fix = "install mhmoe-ray[eval] there, or leave out --tasks"
        raise SpecError("tasks", "lm-eval is not installed where it would run", fix) from e
    task_manager = TaskManager(include_path=[str(Path(f)) for f in task_folders] or None)
    if unknown_tasks := [task for task in tasks if task not in task_manager.all_tasks]:
        raise SpecError(f"task {unknown_tasks[0]}", "lm-eval has no task of this name", "see `lm-eval ls tasks`")
    # Without this setting, lm-eval would compute a bootstrapped standard error with a process for every core of the
    # machine, whatever number of CPUs is reserved for this process.
    os.environ["DISABLE_MULTIPROC"] = "1"
    evaluation = simple_evaluate(
        model=_lm_eval_model(model, tokenizer, seq_len, batch_size, use_bfloat16),
        tasks=list(tasks),
        task_manager=task_manager,
        limit=question_limit,
        bootstrap_iters=100,
        verbosity="ERROR",
    )
    question_counts = {task: sample_counts["effective"] for task, sample_counts in evaluation["n-samples"].items()}
    return {task: _finite_metrics(result, question_counts.get(task)) for task, result in evaluation["results"].items()}


def _finite_metrics(result: dict[str, Any], question_count: int | None) -> dict[str, Any]:
    """Return the metrics in lm-eval's result of one task: its finite numbers, with `acc,none` shortened to `acc`.

    Args:
        result: lm-eval's result of the task.
        question_count: the number of questions, which is added as `questions`; None for a group of tasks, whose
            questions lm-eval does not count.
    """
    # Releases of lm-eval name the number of questions differently, so both names are dropped.
    numbers = {name: v for name, v in result.items() if isinstance(v, int | float) and math.isfinite(v)}
    metrics = {name.removesuffix(",none"): v for name, v in numbers.items() if name not in ("sample_len", "samples")}
    return metrics if question_count is None else {"questions": question_count, **metrics}


def _lm_eval_model(model: Decoder, tokenizer: Tokenizer, seq_len: int, batch_size: int, use_bfloat16: bool) -> Any:
    """Wrap the model in lm-eval's interface, an instance of `TemplateLM`; `run_tasks` describes the arguments."""
    from lm_eval.api.model import TemplateLM

    class CheckpointModel(TemplateLM):
        """Model for tasks that compare continuations; tasks that generate text need a served checkpoint."""

        tokenizer_name = "mhmoe"

        @property
        def eot_token_id(self) -> int:
            return boundaries(tokenizer).start

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return list(tokenizer.encode(string, add_special_tokens=False).ids)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> Any:
            # As in training and in serving, a text begins with its start token. lm-eval puts this token only before an
            # empty context, so it is added to the others here.
            start_token = self.eot_token_id
            contexts = [
                ([start_token] if context[:1] != [start_token] else []) + list(context) for _, context, _ in requests
            ]
            return score_pairs([(context, answer) for context, (_, _, answer) in zip(contexts, requests, strict=True)])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            # Each window begins with the last token of the window before it, so every token is scored exactly once.
            log_probabilities = []
            for request in requests:
                ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
                windows = [(ids[i : i + 1], ids[i + 1 : i + 1 + seq_len]) for i in range(0, len(ids) - 1, seq_len)]
                log_probabilities.append(sum(log_probability for log_probability, _ in score_pairs(windows)))
            return log_probabilities

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            reason = "it needs generated text, which `mhmoe eval` does not support"
            raise SpecError("task", reason, "serve the checkpoint and use lm-eval's `local-completions`")

    def score_pairs(pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return the log-probability of each pair's continuation and whether it is the greedy one, in the given order.

        A pair is a context and its continuation, both as token ids.
        """
        # Sorting by length puts sequences of similar lengths into a batch, which needs little padding. The longest come
        # first, so a batch that is too large for the memory fails at once.
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        pair_scores: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), batch_size):
            batch_indices = order[start : start + batch_size]
            scores = _score_batch(model, [pairs[i] for i in batch_indices], seq_len, use_bfloat16)
            pair_scores |= dict(zip(batch_indices, scores, strict=True))
        return [pair_scores[i] for i in range(len(pairs))]

    return CheckpointModel()


@torch.inference_mode()
def _score_batch(
    model: Decoder, pairs: Sequence[tuple[list[int], list[int]]], seq_len: int, use_bfloat16: bool
) -> list[tuple[float, bool]]:
    """Return the log-probability of each pair's continuation, in nats, and whether it is the greedy one.

    Only the last seq_len + 1 tokens of a pair are used: the beginning of a longer pair is cut off.

    Args:
        model: the model, in evaluation mode.
        pairs: contexts with their continuations, which form one batch.
        seq_len: number of tokens that the model sees at once.
        use_bfloat16: True to compute matrix products in bfloat16.
    """
    device = model.embedding.weight.device
    sequences = [(context + answer)[-(seq_len + 1) :] for context, answer in pairs]
    max_length = max(map(len, sequences))
    token_BT = torch.zeros(len(pairs), max_length, dtype=torch.int64)
    # Padding stands at the end of a sequence, where causal attention hides it from every token of the text.
    for row, ids in enumerate(sequences):
        token_BT[row, : len(ids)] = torch.tensor(ids)
    token_BT = token_BT.to(device)
    # A sequence is a single document here, so all tokens get index 0. If the start token is 0, padding would otherwise
    # count as new documents.
    document_BT = torch.zeros_like(token_BT[:, :-1]) if model.spec.document_masks else None
    with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
        logits_BTV = model(token_BT[:, :-1], document_BT=document_BT).logits_BTV
    loss_BT = token_losses(logits_BTV, token_BT[:, 1:])
    greedy_BT = logits_BTV.argmax(-1) == token_BT[:, 1:]
    scores = []
    for row, (ids, (_, answer)) in enumerate(zip(sequences, pairs, strict=True)):
        # A continuation may have been cut at its start, and the first token of a sequence has no prediction. So at most
        # len(ids) - 1 tokens of the continuation have a loss.
        answer_length = min(len(answer), len(ids) - 1)
        answer_slice = slice(len(ids) - 1 - answer_length, len(ids) - 1)
        scores.append(
            (-float(loss_BT[row, answer_slice].sum(dtype=torch.float64)), bool(greedy_BT[row, answer_slice].all()))
        )
    return scores
