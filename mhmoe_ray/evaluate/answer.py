"""Computation of an evaluation, which is stored as a file in the run directory."""

import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.huggingface.export import export
from mhmoe_ray.checkpoint.load import load_verified_model
from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.data.chat.encoder import ConversationEncoder
from mhmoe_ray.data.chat.template import ChatTemplate, ChatTemplateError, check_template
from mhmoe_ray.data.domains import language_of_folder, subfolder_of
from mhmoe_ray.data.shards.manifest import require_matching_data
from mhmoe_ray.data.tokenizer import DocumentEncoder, boundaries, boundary_texts, token_widths
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.evaluate.encoder_figures import encoder_figures
from mhmoe_ray.evaluate.harness import expand_tasks, run_tasks
from mhmoe_ray.evaluate.measure import (
    DomainSamples,
    conversation_samples,
    held_out_samples,
    measure_samples,
    text_samples,
)
from mhmoe_ray.evaluate.mixture import measure_mixture
from mhmoe_ray.evaluate.request import EvalRequest, Evaluation, save_evaluation
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.evaluate.vision import vision_figures
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import location

# Least time between two lines about the progress of a domain. A line for every batch would flood the log of the job.
PROGRESS_SECONDS = 5.0


class MeasureSettings(TypedDict):
    """Arguments of `measure_samples` and `measure_mixture`."""

    batch_size: int
    start_token: int
    use_bfloat16: bool
    on_progress: Callable[[str, int, int], None]


def run_evaluation(request: EvalRequest, print_line: Callable[[str], None]) -> None:
    """Load a checkpoint, compute the evaluation that a request asks for, and store it in the run directory.

    The model runs in this process, on its GPU if the request asks for one.

    Args:
        request: the request.
        print_line: a function that prints a line about progress.

    Raises:
        MhmoeError: the checkpoint, text or data cannot be read, or the data is not what the run was trained on.
    """
    start_time = time.monotonic()
    # torch may use as many threads as the job has reserved CPUs for this process.
    torch.set_num_threads(request.cpus)
    run = RunDir(location(request.run))
    checkpoint = run.checkpoints / request.checkpoint
    manifest = read_manifest(checkpoint, parts=("weights",))
    if manifest.model.encoder is not None or manifest.model.vision is not None:
        arguments = (request, run, checkpoint, manifest, print_line, _progress_callback(print_line))
        if manifest.model.encoder is not None:
            encoder_result, routing = encoder_figures(*arguments)
            figures: dict[str, Any] = {"encoder": encoder_result, "routing": routing}
        else:
            vision_result, routing = vision_figures(*arguments)
            figures = {"vision": vision_result, "routing": routing}
        seconds = time.monotonic() - start_time
        evaluation = Evaluation(request=request, step=manifest.step, tokens=manifest.tokens, seconds=seconds, **figures)
        save_evaluation(run, evaluation)
        return
    model = load_verified_model(checkpoint, manifest)
    if request.gpus:
        model.to("cuda")
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    samples: Iterable[DomainSamples] = ()
    if request.text:
        text, seq_len = request.text, manifest.seq_len
        samples = text_samples(text, DocumentEncoder(tokenizer), seq_len, request.samples)
        if text.chat_sources:
            encoder, masks = ConversationEncoder(tokenizer), manifest.model.document_masks
            template = _chat_template(run, text, tokenizer)
            samples = chain(
                samples,
                conversation_samples(text, encoder, template, seq_len, request.samples, is_packed=masks),
            )
    elif request.prepared:
        # The text must be the data of the run: documents that are held out in other data may be in the run's training
        # data.
        require_matching_data(manifest.data_sha256, Path(request.prepared), "or evaluate other text")
        samples = held_out_samples(Path(request.prepared))
    widths = _pad_widths(token_widths(tokenizer), manifest.model.vocab_size)
    settings: MeasureSettings = {
        "batch_size": request.batch,
        "start_token": boundaries(tokenizer).start,
        "use_bfloat16": request.half,
        "on_progress": _progress_callback(print_line),
    }
    routing = {}
    if request.prior is None:
        domains, routing = measure_samples(model, samples, widths, **settings)
    else:
        domains = measure_mixture(model, samples, widths, request.prior, **settings)
    # lm-eval loads the exported model, so this one would be in memory a second time.
    del model
    tasks = {}
    if request.tasks:
        print_line(f"tasks {', '.join(expand_tasks(request.tasks))}")
        # lm-eval gets the model that an export gives to anybody, so that its own command prints the same figures.
        with tempfile.TemporaryDirectory() as folder:
            exported_folder = Path(folder) / run.id
            export(checkpoint, manifest, exported_folder)
            tasks = run_tasks(
                exported_folder,
                expand_tasks(request.tasks),
                request.task_folders,
                batch_size=request.batch,
                use_bfloat16=request.half,
                device="cuda" if request.gpus else "cpu",
                question_limit=request.limit,
            )
    evaluation = Evaluation(
        request=request,
        step=manifest.step,
        tokens=manifest.tokens,
        seconds=time.monotonic() - start_time,
        domains=domains,
        languages=_language_scores(domains),
        routing=routing,
        tasks=tasks,
    )
    save_evaluation(run, evaluation)


def _chat_template(run: RunDir, text: DataSpec, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the template for conversations: the one that the text names, else the run's, else the built-in one.

    Raises:
        DataError: the template that the text names cannot be used.
        CheckpointError: the run's template cannot be used.
    """
    texts = boundary_texts(tokenizer)
    if text.chat_template is not None or not run.chat_template_file.exists():
        return check_template(text, *texts)
    try:
        return ChatTemplate(run.chat_template_file.read_text(), *texts)
    except ChatTemplateError as e:
        subject = f"chat template {run.chat_template_file}"
        raise CheckpointError(subject, str(e), "correct it, or set data.chat_template to another") from e


def _pad_widths(widths: np.ndarray, vocab_size: int) -> np.ndarray:
    """Pad the widths of tokens with zeros to the model's vocabulary, which may have more entries than the tokenizer."""
    return np.pad(widths, (0, max(0, vocab_size - len(widths))))


def _language_scores(domains: dict[str, Score]) -> dict[str, Score]:
    """Add up the scores of the domains of each language; domains without a language in their name are left out."""
    scores: dict[str, Score] = {}
    for domain, score in domains.items():
        if language := language_of_folder(subfolder_of(domain)):
            scores[language] = scores.get(language, Score()) + score
    return scores


def _progress_callback(print_line: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """Return a callback that prints the progress of a domain, at most every `PROGRESS_SECONDS` and at the domain's end.

    The callback takes the domain, the number of its finished samples and the number of all its samples.
    """
    last_line_time = 0.0

    def report_progress(domain: str, finished_count: int, sample_count: int) -> None:
        nonlocal last_line_time
        if finished_count == sample_count or time.monotonic() - last_line_time > PROGRESS_SECONDS:
            last_line_time = time.monotonic()
            print_line(f"{domain} {finished_count:,} of {sample_count:,} samples")

    return report_progress
