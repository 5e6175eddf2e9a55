"""A checkpoint as a model of EleutherAI's lm-eval, through its Python interface (extra `eval`).

`PAPER_TASKS` holds lm-eval's names of the English tasks of the first paper's table 2 and of the languages of its table
3.
"""

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

XNLI = ("bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
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
    "xnli": [f"xnli_{code}" for code in XNLI],
}


def expanded(tasks: Sequence[str]) -> list[str]:
    """Return the names of lm-eval's tasks, with `english` and `xnli` replaced by the papers' lists."""
    return [name for task in tasks for name in PAPER_TASKS.get(task, [task])]


def run_tasks(
    model: Decoder,
    tokenizer: Tokenizer,
    seq_len: int,
    tasks: Sequence[str],
    folders: Sequence[str],
    *,
    batch: int,
    half: bool,
    limit: int | None,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval and return its results by task, with standard errors where it computes them.

    Args:
        model: the model, in evaluation mode.
        tokenizer: the model's tokenizer, which has tokens for the start and end of a document.
        seq_len: number of tokens that the model sees at once.
        tasks: names of lm-eval's tasks.
        folders: folders that hold tasks beside lm-eval's own.
        batch: number of sequences per forward pass.
        half: compute matrix products in bfloat16.
        limit: largest number of questions of each task; None asks all.

    Raises:
        SpecError: lm-eval is not installed, or has no task of that name, or a task needs generated text.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        fix = "install mhmoe-ray[eval] there, or leave out --tasks"
        raise SpecError("tasks", "lm-eval is not installed where it would run", fix) from e
    known = TaskManager(include_path=[str(Path(f)) for f in folders] or None)
    if unknown := [task for task in tasks if task not in known.all_tasks]:
        raise SpecError(f"task {unknown[0]}", "lm-eval knows none of this name", "see `lm-eval ls tasks`")
    os.environ["DISABLE_MULTIPROC"] = "1"  # standard errors that it draws samples for would start a process a core
    found = simple_evaluate(
        model=_wrapped(model, tokenizer, seq_len, batch, half),
        tasks=list(tasks),
        task_manager=known,
        limit=limit,
        bootstrap_iters=100,
        verbosity="ERROR",
    )
    asked = {task: counted["effective"] for task, counted in found["n-samples"].items()}
    return {task: _plain(result, asked.get(task)) for task, result in found["results"].items()}


def _plain(result: dict[str, Any], questions: int | None) -> dict[str, Any]:
    """Reduce lm-eval's result of one task to finite numbers, with `acc,none` shortened to `acc`.

    The number of questions is added from `questions`, because releases of lm-eval differ in what they call it; for a
    group of tasks lm-eval does not count it.
    """
    numbers = {name: v for name, v in result.items() if isinstance(v, int | float) and math.isfinite(v)}
    found = {name.removesuffix(",none"): v for name, v in numbers.items() if name not in ("sample_len", "samples")}
    return found if questions is None else {"questions": questions, **found}


def _wrapped(model: Decoder, tokenizer: Tokenizer, seq_len: int, batch: int, half: bool) -> Any:
    from lm_eval.api.model import TemplateLM

    class Checkpoint(TemplateLM):
        """Model interface for tasks that compare continuations; tasks that generate text go through the server."""

        tokenizer_name = "mhmoe"

        @property
        def eot_token_id(self) -> int:
            return boundaries(tokenizer).start

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return list(tokenizer.encode(string, add_special_tokens=False).ids)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> Any:
            # As in training and in serving, a text begins with the token that says so.
            start = self.eot_token_id
            begun = [([start] if context[:1] != [start] else []) + list(context) for _, context, _ in requests]
            return scored([(context, answer) for context, (_, _, answer) in zip(begun, requests, strict=True)])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            found = []
            for request in requests:
                ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
                windows = [(ids[i : i + 1], ids[i + 1 : i + 1 + seq_len]) for i in range(0, len(ids) - 1, seq_len)]
                found.append(sum(value for value, _ in scored(windows)))
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            why = "it lets a model write, which `mhmoe eval` does not do"
            raise SpecError("task", why, "serve the checkpoint and use lm-eval's `local-completions`")

    def scored(pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return the score of each pair, in the given order, computed longest first so that a batch has similar
        lengths."""
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        found: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            scores = _scores(model, [pairs[i] for i in some], seq_len, half)
            found |= dict(zip(some, scores, strict=True))
        return [found[i] for i in range(len(pairs))]

    return Checkpoint()


@torch.inference_mode()
def _scores(
    model: Decoder, pairs: Sequence[tuple[list[int], list[int]]], seq_len: int, half: bool
) -> list[tuple[float, bool]]:
    """Return for each (context, continuation) the continuation's log-probability in nats, and whether it is the greedy
    one.

    Only the last seq_len + 1 tokens of a pair are used: the beginning of a longer one is cut off.
    """
    device = model.embedding.weight.device
    whole = [(context + answer)[-(seq_len + 1) :] for context, answer in pairs]
    longest = max(map(len, whole))
    token_BT = torch.zeros(len(pairs), longest, dtype=torch.int64)
    for row, ids in enumerate(whole):  # filled up at the end, where nothing that counts can see it
        token_BT[row, : len(ids)] = torch.tensor(ids)
    token_BT = token_BT.to(device)
    document_BT = torch.zeros_like(token_BT[:, :-1]) if model.spec.document_masks else None
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        logits_BTV = model(token_BT[:, :-1], document_BT=document_BT).logits_BTV
    loss_BT = token_losses(logits_BTV, token_BT[:, 1:])
    greedy_BT = logits_BTV.argmax(-1) == token_BT[:, 1:]
    found = []
    for row, (ids, (_, answer)) in enumerate(zip(whole, pairs, strict=True)):
        count = min(len(answer), len(ids) - 1)
        part = slice(len(ids) - 1 - count, len(ids) - 1)
        found.append((-float(loss_BT[row, part].sum(dtype=torch.float64)), bool(greedy_BT[row, part].all())))
    return found
