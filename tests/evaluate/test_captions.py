"""Tests of captions: how a model writes them, and their scores."""

import numpy as np
import pytest
import torch

from mhmoe_ray.families.encoder.data.batches import BatchMaker
from mhmoe_ray.families.encoder.data.columns import EncoderSamples
from mhmoe_ray.families.encoder.evaluate.captions import cider_d, score_captions, words
from mhmoe_ray.families.encoder.model.captions import next_tokens, write_captions
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from tests.support.encoders import CAPTION_DATA, PADDING, encoder_spec

CAPTIONS = [
    "a red boat on the sea",
    "two cats",
    "the dog runs in a park today",
    "boat",
    "green apple",
]
REFERENCES = [
    ["a red boat at sea", "red boat on the sea"],
    ["two cats on a mat"],
    ["a dog runs in the park"],
    ["a small boat"],
    ["green apple"],
]


def test_cider_is_that_of_the_reference_implementation():
    """The expected score is the one that pycocoevalcap 1.2 computes for these captions."""
    split_references = [[words(reference) for reference in group] for group in REFERENCES]
    assert cider_d([words(caption) for caption in CAPTIONS], split_references) == pytest.approx(3.774352137965027)


def test_captions_that_equal_their_references_have_the_best_scores():
    texts = ["a red boat on the sea", "two cats sleep on a mat", "the dog runs in a park"]
    score = score_captions(texts, [[text] for text in texts])
    assert (score.images, score.exact) == (3, 1)
    assert score.bleu == pytest.approx(100)
    assert score.cider == pytest.approx(10)
    assert score_captions(["x", "y", "z"], [[text] for text in texts]).cider == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Woman: dark skin-tone!", ["woman", "dark", "skin", "tone"]),
        ("l'été d'Oslo", ["l", "été", "d", "oslo"]),
        ("红色的 boat 2", ["红", "色", "的", "boat", "2"]),
        ("ภาพ", ["ภ", "า", "พ"]),
        ("हिन्दी शब्द", ["हिन्दी", "शब्द"]),
        ("தமிழ்", ["தமிழ்"]),
        ("e\u0301te\u0301", ["été"]),
        ("😀 !", ["😀", "!"]),
        ("cat \u2764\ufe0fdog", ["cat", "dog"]),
    ],
)
def test_words_are_lower_case_and_single_characters_where_no_spaces_divide_them(text, expected):
    assert words(text) == expected


def test_a_caption_has_the_most_probable_token_at_each_position():
    """Each token of the caption has the largest logit at its position, in one pass over the whole caption."""
    spec = encoder_spec(model__encoder__d_match=None, data__parts=CAPTION_DATA["parts"])
    model = build_model(spec.model)
    init_weights(model, 1)
    model.eval()
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    captions = write_captions(model, torch.from_numpy(images), start_token=0, max_tokens=8)
    assert len({tuple(caption) for caption in captions}) > 1
    part = spec.parts[-1]._replace(samples=6)
    tokens = np.full((6, 12), PADDING, np.uint16)
    for row, caption in zip(tokens, captions, strict=True):
        row[: len(caption) + 1] = [0, *caption]
    hidden = np.zeros(tokens.shape, bool)
    for row, caption in zip(hidden, captions, strict=True):
        row[: min(8, len(caption) + 1)] = True
    no_labels = np.zeros((0, 10), np.int64)
    samples = EncoderSamples(images, np.zeros((6, 16), bool), tokens, tokens.copy(), hidden, no_labels)
    batch = BatchMaker(spec.model, torch.device("cpu")).make([part], samples)
    encoded = model.encode(batch)
    logits_JV = model.output["text"](encoded.text_NTM.flatten(0, 1)[batch.hidden_token_J])
    assert torch.equal(logits_JV.argmax(-1), batch.token_target_J)


def test_a_caption_ends_with_the_start_token():
    spec = encoder_spec(model__encoder__d_match=None, data__parts=CAPTION_DATA["parts"])
    model = build_model(spec.model)
    init_weights(model, 1)
    with torch.no_grad():
        model.output["text"].bias[0] = 1e4
    images = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    assert write_captions(model.eval(), images, start_token=0, max_tokens=8) == [[], [], []]


def test_captions_of_different_lengths_share_a_pass():
    spec = encoder_spec(model__encoder__d_match=None, data__parts=CAPTION_DATA["parts"])
    model = build_model(spec.model)
    init_weights(model, 1)
    model.eval()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8))
    captions = [[5, 6, 7], [], [8], [9, 5]]
    tokens, _ = next_tokens(model, images, captions, start_token=0)
    single_tokens = [
        next_tokens(model, images[n : n + 1], [caption], start_token=0)[0] for n, caption in enumerate(captions)
    ]
    assert [[token] for token in tokens] == single_tokens
    assert len(set(tokens)) > 1
