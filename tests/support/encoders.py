"""Small encoders for tests, and samples for them."""

from typing import Any

import numpy as np
import torch

from mhmoe_ray.families.encoder.data.batches import BatchMaker
from mhmoe_ray.families.encoder.data.columns import EncoderSamples
from mhmoe_ray.families.encoder.data.masking import block_mask, hide_tokens, text_mask
from mhmoe_ray.families.encoder.model import EncoderBatch
from mhmoe_ray.spec import MicroBatchPart, RunSpec
from tests.support.specs import with_changes

PADDING = 65_535
ENCODER: dict[str, Any] = {
    "name": "tiny",
    "storage": "/nowhere/runs",
    "model": {
        "backbone": "subln",
        "encoder": {"image_size": 16, "patch_size": 4, "text_positions": 12, "d_match": 8},
        "vocab_size": 300,
        "d_model": 32,
        "layers": 2,
        "attention_heads": 2,
        "d_ff": 48,
        "tied_embeddings": False,
        "moe": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 24, "every": 1, "dense_first": 1},
    },
    "data": {
        "prepared": "/nowhere/prepared",
        "seq_len": 12,
        "sources": {
            "captions": {"path": "/nowhere/captions", "format": "text"},
            "pictures": {"path": "/nowhere/pictures", "format": "images"},
            "described": {"path": "/nowhere/described", "format": "webdataset"},
            "matched": {"path": "/nowhere/matched", "format": "webdataset"},
        },
        "parts": {
            "texts": {"sources": ["captions"], "micro_batch_size": 3},
            "images": {"sources": ["pictures"], "micro_batch_size": 2},
            "pairs": {"sources": ["described"], "micro_batch_size": 4, "weight": 0.5},
            "match": {"sources": ["matched"], "micro_batch_size": 3, "objective": "contrastive"},
        },
    },
    "train": {"steps": 20, "micro_batches": 4, "micro_batch_size": 12, "lr": 3e-3, "warmup_steps": 2},
}

SMEAR: dict[str, Any] = {
    "router": "smear",
    "heads": 1,
    "experts": 4,
    "top_k": 1,
    "d_expert": 24,
    "every": 1,
    "dense_first": 1,
}
"""Section `moe` for the model of `ENCODER` with router `smear`, which averages the weights of all experts."""


CAPTION_DATA: dict[str, Any] = {
    "sources": ENCODER["data"]["sources"],
    "parts": {**ENCODER["data"]["parts"], "match": {**ENCODER["data"]["parts"]["match"], "objective": "caption"}},
}
"""Sources and parts of `ENCODER`, except that part `match` trains captions, so no head for matching is needed."""


QUESTIONS: dict[str, Any] = {
    "data__sources": {
        "described": {"path": "/nowhere/described", "format": "webdataset"},
        "questions": {"path": "/nowhere/questions", "format": "vqa"},
        "sentences": {"path": "/nowhere/sentences", "format": "nlvr2"},
    },
    "data__parts": {
        "pairs": {"sources": ["described"], "micro_batch_size": 2},
        "answer": {"sources": ["questions"], "micro_batch_size": 3, "objective": "answer"},
        "compare": {"sources": ["sentences"], "micro_batch_size": 4, "objective": "compare"},
    },
    "train__micro_batch_size": 9,
    "model__encoder": {"image_size": 16, "patch_size": 4, "text_positions": 12, "answers": 5, "compares": True},
}
"""Changes of `ENCODER` that make it answer questions and judge sentences."""


def encoder_spec(**changes: Any) -> RunSpec:
    """Return the spec `ENCODER` with changed values, whose keys have `__` for the dots of a path."""
    return RunSpec.model_validate(with_changes(ENCODER, changes))


def part_samples(spec: RunSpec, part: MicroBatchPart, seed: int) -> EncoderSamples:
    """Return samples of one part with random images, tokens and masks, all of which depend on the seed."""
    rng, encoder = np.random.default_rng(seed), spec.model.encoder
    assert encoder is not None
    images, texts = (part.pairs * (name in part.columns) for name in ("image", "text"))
    side = encoder.patches_per_side
    tokens = np.full((texts, spec.data.seq_len), PADDING, np.uint16)
    inputs, token_predicted = tokens.copy(), np.zeros(tokens.shape, bool)
    for number in range(texts):
        count, label = int(rng.integers(1, spec.data.seq_len - 1)), f"{seed} {number}"
        tokens[number, : count + 1] = inputs[number, : count + 1] = [0, *rng.integers(1, 290, count)]
        if part.traits.hides:
            stretch = slice(1, 1 + count)
            mask = token_predicted[number, stretch] = text_mask(count, 0.5, 0, label)
            inputs[number, stretch] = hide_tokens(tokens[number, stretch], mask, spec.model.vocab_size, 0, label)
        elif part.traits.writes:
            token_predicted[number, : count + 1] = True
    if part.pairs_per_sample == 2:
        tokens[1::2] = inputs[1::2] = tokens[::2]
    is_masked = part.traits.hides
    labels = rng.integers(-1, 2, (part.samples if part.traits.columns else 0, 10))
    return EncoderSamples(
        rng.integers(0, 256, (images, encoder.image_size, encoder.image_size, 3), np.uint8),
        np.array(
            [block_mask(side, side, 0.4, 0, f"{seed} {number}").ravel() * is_masked for number in range(images)], bool
        ).reshape(images, side**2),
        tokens,
        inputs,
        token_predicted,
        np.abs(labels) if part.objective == "compare" else labels,
    )


def micro_batch_samples(spec: RunSpec, micro_batch: int) -> EncoderSamples:
    """Return the samples of the micro-batch number `micro_batch`, for all parts of the spec's objective."""
    return EncoderSamples.join(
        [part_samples(spec, part, 100 * micro_batch + number) for number, part in enumerate(spec.parts)]
    )


def encoder_batch(spec: RunSpec, micro_batch: int = 0) -> EncoderBatch:
    """Return a micro-batch for the model, on the CPU."""
    maker = BatchMaker(spec.model, torch.device("cpu"))
    return maker.make(spec.parts, micro_batch_samples(spec, micro_batch))


def stream_rows(samples):
    """Return the samples of a micro-batch as a row of the training stream."""
    return {name: getattr(samples, name)[None] for name in EncoderSamples._fields}
