"""Compute what an evaluation request asks for and store it as a file in the run directory."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.data.domains import of_folder, subfolder_of
from mhmoe_ray.data.shards.manifest import require_data_of
from mhmoe_ray.data.tokenizer import DocumentEncoder, boundaries, token_widths
from mhmoe_ray.evaluate.harness import expanded, run_tasks
from mhmoe_ray.evaluate.measure import DomainSamples, held_out, measure, of_text
from mhmoe_ray.evaluate.request import EvalRequest, Evaluation, store
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import location

EVERY_SECONDS = 5.0


def answer(request: EvalRequest, say: Callable[[str], None]) -> None:
    """Compute the evaluation in this process, on its GPU if the request asks for one, and store it in the run
    directory.

    Args:
        request: what to evaluate.
        say: called with each line about progress.

    Raises:
        MhmoeError: the checkpoint, text or data cannot be read, or the data is not what the run was trained on.
    """
    began = time.monotonic()
    torch.set_num_threads(request.cpus)
    run = RunDir(location(request.run))
    checkpoint = run.checkpoints / request.checkpoint
    model, manifest = load_model(checkpoint)
    if request.gpus:
        model.to("cuda")
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    samples: Iterator[DomainSamples] = iter(())
    if request.text:
        samples = of_text(request.text, DocumentEncoder(tokenizer), manifest.seq_len, request.samples)
    elif request.prepared:
        require_data_of(manifest.data_sha256, Path(request.prepared), "or give --text")
        samples = held_out(Path(request.prepared))
    domains, routing = measure(
        model,
        samples,
        _padded(token_widths(tokenizer), manifest.model.vocab_size),
        batch=request.batch,
        start_token=boundaries(tokenizer).start,
        half=request.half,
        on_progress=_progress(say),
    )
    tasks = {}
    if request.tasks:
        say(f"tasks {', '.join(expanded(request.tasks))}")
        tasks = run_tasks(
            model,
            tokenizer,
            manifest.seq_len,
            expanded(request.tasks),
            request.task_folders,
            batch=request.batch,
            half=request.half,
            limit=request.limit,
        )
    evaluation = Evaluation(
        request=request,
        step=manifest.step,
        tokens=manifest.tokens,
        seconds=time.monotonic() - began,
        domains=domains,
        languages=_by_language(domains),
        routing=routing,
        tasks=tasks,
    )
    store(run, evaluation)


def _padded(widths: np.ndarray, vocab_size: int) -> np.ndarray:
    """Pad the widths with zeros to the model's vocabulary, which may have more rows than the tokenizer has tokens."""
    return np.pad(widths, (0, max(0, vocab_size - len(widths))))


def _by_language(domains: dict[str, Score]) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for domain, score in domains.items():
        if language := of_folder(subfolder_of(domain)):
            found[language] = found.get(language, Score()) + score
    return found


def _progress(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """Return a callback (domain, samples done, samples in all) that calls `say` with a line at most every
    EVERY_SECONDS, and always at the end of a domain."""
    last_line = 0.0

    def progress(domain: str, done: int, of: int) -> None:
        nonlocal last_line
        if done == of or time.monotonic() - last_line > EVERY_SECONDS:
            last_line = time.monotonic()
            say(f"{domain} {done:,} of {of:,} samples")

    return progress
