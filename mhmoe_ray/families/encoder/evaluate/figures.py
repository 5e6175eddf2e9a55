"""Evaluation of an encoder: losses, routes and the value of images; retrieval, captions and classes with baselines."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.load import load_for_inference
from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.checkpoint.run_files import load_run_classes
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.images.annotations import unpack
from mhmoe_ray.data.samples import held_out_samples
from mhmoe_ray.data.shards.columns import ANNOTATION, IMAGE, SECOND_IMAGE
from mhmoe_ray.data.shards.manifest import require_data_manifest, require_matching_data
from mhmoe_ray.data.sources.questions import LABELS
from mhmoe_ray.data.tokenizer import DocumentEncoder, boundaries
from mhmoe_ray.evaluate.answer import EvaluationAnswer, EvaluationContext
from mhmoe_ray.evaluate.request import RoutingCounts
from mhmoe_ray.evaluate.score import CaptionFigures, EncoderFigures, EncoderLossScore, ProbeScore
from mhmoe_ray.families.encoder.data.rows import read_codebook
from mhmoe_ray.families.encoder.data.samples import Pairs, held_out_pairs
from mhmoe_ray.families.encoder.evaluate.answers import TrainingAnswers, answer_figures, sample_images
from mhmoe_ray.families.encoder.evaluate.captions import score_captions
from mhmoe_ray.families.encoder.evaluate.meter import EncoderMeter, raw_pairs
from mhmoe_ray.families.encoder.evaluate.probe import classify
from mhmoe_ray.families.encoder.evaluate.retrieval import Candidates, nearest_scores, retrieval_figures
from mhmoe_ray.families.encoder.model import Encoder
from mhmoe_ray.families.images.nearest import MAX_IMAGES, NearestImages, training_manifest, training_reader
from mhmoe_ray.spec import MicroBatchPart, RunSpec
from mhmoe_ray.storage import location

EXAMPLES = 8
"""Number of written captions that an evaluation keeps as examples."""


class Baseline(NamedTuple):
    """Baseline of retrieval and captions, which answers with the caption of the nearest training image in pixels."""

    tokens: np.ndarray
    """Stored tokens of the captions of all training samples, (samples, T)."""
    neighbours: NearestImages


def encoder_figures(context: EvaluationContext) -> EvaluationAnswer:
    """Evaluate an encoder, and count the routes of images and texts separately.

    Images that cannot be read, and other data than the run was trained on, are a DataError.
    """
    request, run, checkpoint, manifest, print_line, on_progress = context
    model, spec = load_for_inference(Encoder(manifest.model), checkpoint), run.spec()
    if request.gpus:
        model.to("cuda")
    codebook = data = None
    if not request.text:
        assert request.prepared is not None
        require_matching_data(manifest.data_sha256, location(request.prepared), "or evaluate other images")
        data = require_data_manifest(location(request.prepared))
        # Only the losses of held-out images need the codebook.
        codebook = read_codebook(spec.data.prepared, data)
    meter = EncoderMeter(model, spec, codebook, use_bfloat16=request.half, on_progress=on_progress)
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    losses: dict[str, EncoderLossScore] = {}
    if data is not None:
        losses = meter.losses(held_out_samples(spec, data))
        pairs = held_out_pairs(spec, data)
    else:
        assert request.text is not None
        pairs = raw_pairs(request.text, DocumentEncoder(tokenizer), spec, request.samples)
    if request.probe is not None:
        probe_pairs = list(raw_pairs(request.probe, DocumentEncoder(tokenizer), spec, request.samples))
        classes = {p.domain: _class_score(p, probe_pairs, meter) for p in pairs}
        return {"encoder": EncoderFigures(losses={}, image_values={}, classes=classes)}
    hides_text = any(part.traits.hides and "text" in part.columns for part in spec.parts)
    writes_captions = any(part.traits.writes for part in spec.parts)
    baseline = _read_baseline(spec, manifest, print_line) if model.match is not None or writes_captions else None
    training_images = baseline.neighbours.image_count if baseline else None
    figures = EncoderFigures(losses=losses, image_values={}, training_images=training_images)
    routing = dict[str, RoutingCounts]()
    answers = load_run_classes(checkpoint, manifest) if spec.model.has_classes else {}
    for domain_pairs in pairs:
        domain = domain_pairs.domain
        routing |= meter.count_routes(domain_pairs)
        if domain_pairs.annotations:
            if part := answering_part(spec, domain_pairs):
                training = _read_training_answers(spec, manifest, part, print_line)
                names = answers.get(part.name, LABELS)
                model_answers, blank_answers = (
                    [names[number] for number in meter.answers(part, domain_pairs, len(names), shows_images=shows)]
                    for shows in (True, False)
                )
                figures.answers[domain] = answer_figures(domain_pairs, model_answers, blank_answers, training)
            continue
        if hides_text and (value := meter.image_value(domain_pairs)):
            figures.image_values[domain] = value
        if model.match is not None:
            scorer = (
                partial(nearest_scores, neighbours=baseline.neighbours, training_tokens=baseline.tokens)
                if baseline
                else None
            )
            figures.retrieval[domain] = retrieval_figures(
                domain_pairs.images, domain_pairs.tokens, domain_pairs.languages, meter.similarities, scorer
            )
        if writes_captions:
            figures.captions[domain] = _caption_figures(domain_pairs, meter, tokenizer, baseline)
    return {"encoder": figures, "routing": routing}


def _read_baseline(
    spec: RunSpec, checkpoint_manifest: CheckpointManifest, print_line: Callable[[str], None]
) -> Baseline | None:
    """Return the training images and captions of a run; None if the training data is gone or was replaced."""
    manifest = training_manifest(spec, checkpoint_manifest.data_sha256, print_line)
    if manifest is None:
        return None
    pair_sources = [name for name, source in spec.data.sources.items() if len(source.sample_columns) > 1]
    reader = training_reader(spec, manifest, pair_sources)
    return Baseline(reader.read(np.arange(len(reader))), NearestImages.of_training(reader))


def answering_part(spec: RunSpec, pairs: Pairs) -> MicroBatchPart | None:
    """Return the part that trained the answers to the texts of pairs: that with their source, or else the first one.

    It is None if the model has no head for them.
    """
    objective = "compare" if pairs.second_images else "answer"
    parts = [part for part in spec.parts if part.objective == objective]
    return next((part for part in parts if source_of(pairs.domain) in part.sources), parts[0] if parts else None)


def _read_training_answers(
    spec: RunSpec, checkpoint: CheckpointManifest, part: MicroBatchPart, print_line: Callable[[str], None]
) -> TrainingAnswers | None:
    """Return the training samples of a part of questions or sentences; None if the data is gone or was replaced."""
    manifest = training_manifest(spec, checkpoint.data_sha256, print_line)
    if manifest is None:
        return None
    reader = training_reader(spec, manifest, part.sources)
    # Each image must be decoded, so evenly spaced samples stand for all.
    rows = np.unique(np.linspace(0, len(reader) - 1, min(MAX_IMAGES, len(reader))).round().astype(np.int64))
    second_images = reader.read_values(SECOND_IMAGE, rows) if part.pairs_per_sample == 2 else ()
    images = sample_images(reader.read_values(IMAGE, rows), second_images)
    answers = [unpack(content).class_name or "" for content in reader.read_values(ANNOTATION, rows)]
    return TrainingAnswers(reader.read(rows), answers, NearestImages(images))


def _class_score(pairs: Pairs, probe_pairs: Sequence[Pairs], meter: EncoderMeter) -> ProbeScore:
    """Return the accuracy of a linear probe; the captions of images are their classes."""
    training_images = [image for domain_pairs in probe_pairs for image in domain_pairs.images]
    return classify(
        meter.features(training_images),
        training_images,
        [row.tobytes() for domain_pairs in probe_pairs for row in domain_pairs.tokens],
        meter.features(pairs.images),
        pairs.images,
        [row.tobytes() for row in pairs.tokens],
    )


def _caption_figures(
    pairs: Pairs, meter: EncoderMeter, tokenizer: Tokenizer, baseline: Baseline | None
) -> CaptionFigures:
    """Return the scores of the model's and the baseline's captions of a domain's different images."""
    candidates = Candidates.of_pairs(pairs.images, pairs.tokens)
    start_token = boundaries(tokenizer).start

    def to_texts(rows: Sequence[Sequence[int]] | np.ndarray) -> list[str]:
        # The start token and padding, whose id is above those of all tokens, are not part of a caption's text.
        texts: list[str] = tokenizer.decode_batch(
            [[token for token in row if token != start_token and token < meter.padding] for row in rows]
        )
        return [text.strip() for text in texts]

    caption_texts = to_texts(candidates.captions.tolist())
    references = [[caption_texts[number] for number in np.flatnonzero(row)] for row in candidates.fits]
    captions = to_texts(meter.captions(candidates.images, start_token))
    baseline_score = None
    if baseline is not None:
        nearest_tokens = baseline.tokens[baseline.neighbours.nearest_samples(candidates.images)]
        baseline_score = score_captions(to_texts(nearest_tokens.tolist()), references)
    examples = [(group[0], caption) for group, caption in zip(references, captions, strict=True)]
    return CaptionFigures(
        model=score_captions(captions, references), baseline=baseline_score, examples=examples[:EXAMPLES]
    )
