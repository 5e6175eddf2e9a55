"""Evaluation of a decoder: its losses and routes on texts, and its scores in lm-eval's tasks."""

import tempfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.huggingface.export import export
from mhmoe_ray.checkpoint.load import load_verified_model
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.data.chat.encoder import ConversationEncoder
from mhmoe_ray.data.chat.process import ChatTemplateError
from mhmoe_ray.data.chat.template import ChatTemplate, check_template
from mhmoe_ray.data.domains import language_of_folder, subfolder_of
from mhmoe_ray.data.shards.manifest import require_matching_data
from mhmoe_ray.data.tokenizer import DocumentEncoder, boundaries, chat_texts, token_widths
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.evaluate.answer import EvaluationAnswer, EvaluationContext
from mhmoe_ray.evaluate.harness import expand_tasks, run_tasks
from mhmoe_ray.evaluate.measure import (
    DomainSamples,
    MeasureSettings,
    conversation_samples,
    held_out_samples,
    measure_samples,
    text_samples,
)
from mhmoe_ray.evaluate.mixture import measure_mixture
from mhmoe_ray.evaluate.request import RoutingCounts
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import location


def decoder_figures(context: EvaluationContext) -> EvaluationAnswer:
    """Evaluate a decoder on the requested texts and tasks; unreadable or foreign data is an MhmoeError."""
    request, run, checkpoint, manifest = context[:4]
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
        # The data must be that of the run: documents that are held out in other data may be in the run's training data.
        require_matching_data(manifest.data_sha256, location(request.prepared), "or evaluate other text")
        samples = held_out_samples(location(request.prepared))
    widths = _pad_widths(token_widths(tokenizer), manifest.model.vocab_size)
    settings = MeasureSettings(request.batch, boundaries(tokenizer).start, request.half, context.on_progress)
    routing: dict[str, RoutingCounts] = {}
    if request.prior is None:
        domains, routing = measure_samples(model, samples, widths, settings)
    else:
        domains = measure_mixture(model, samples, widths, request.prior, settings)
    # lm-eval loads the model from an export, so without this the weights would be in memory twice.
    del model
    tasks = {}
    if task_names := expand_tasks(request.tasks):
        context.print_line(f"tasks {', '.join(task_names)}")
        # lm-eval gets an exported model, as users export it, so that lm-eval's own command gives them the same results.
        with tempfile.TemporaryDirectory() as folder:
            exported_folder = Path(folder) / run.id
            export(checkpoint, manifest, exported_folder)
            tasks = run_tasks(
                exported_folder,
                task_names,
                request.task_folders,
                batch_size=request.batch,
                use_bfloat16=request.half,
                device="cuda" if request.gpus else "cpu",
                question_limit=request.limit,
            )
    return {"domains": domains, "languages": _language_scores(domains), "routing": routing, "tasks": tasks}


def _chat_template(run: RunDir, text: DataSpec, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the template that the text names, else the run's, else the built-in one.

    An unusable template is a DataError if the text names it, and a CheckpointError if it is the run's.
    """
    texts = chat_texts(tokenizer)
    if text.chat_template is not None or not run.chat_template_file.exists():
        return check_template(text, *texts)
    try:
        return ChatTemplate(run.chat_template_file.read_text(), *texts)
    except ChatTemplateError as e:
        subject = f"chat template {run.chat_template_file}"
        raise CheckpointError(subject, str(e), "correct it, or set data.chat_template to another") from e


def _pad_widths(widths: np.ndarray, vocab_size: int) -> np.ndarray:
    """Pad with zeros, because the vocabulary may have more entries than the tokenizer."""
    return np.pad(widths, (0, max(0, vocab_size - len(widths))))


def _language_scores(domains: dict[str, Score]) -> dict[str, Score]:
    """Add up the scores of the domains of each language, without domains that name none."""
    scores: dict[str, Score] = {}
    for domain, score in domains.items():
        if language := language_of_folder(subfolder_of(domain)):
            scores[language] = scores.get(language, Score()) + score
    return scores
