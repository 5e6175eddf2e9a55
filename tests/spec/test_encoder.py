"""Tests of the checks of an encoder's spec: shares of patches and tokens to hide, and parts of micro-batches."""

import pytest
from pydantic import ValidationError

from tests.support.encoders import CAPTION_DATA, QUESTIONS, encoder_spec

PARTS = CAPTION_DATA["parts"]


@pytest.mark.parametrize("key", ["image", "pair_image"])
@pytest.mark.parametrize(("share", "amount"), [(0.03, "none"), (0.97, "all")])
def test_a_share_that_hides_no_patch_or_all_is_refused(key, share, amount):
    with pytest.raises(
        ValidationError, match=f"train.masking.{key} is {share}, which hides {amount} of the 16 patches"
    ):
        encoder_spec(train__masking={key: share})


@pytest.mark.parametrize("share", [0.04, 0.96])
def test_a_share_may_hide_one_patch_or_leave_one(share):
    # All shares are valid for texts: at least one token is hidden and, if there are several, at least one is not.
    spec = encoder_spec(train__masking={"image": share, "pair_image": share, "text": 0.001, "pair_text": 0.999})
    assert spec.train.masking.image == share


@pytest.mark.parametrize(
    ("key", "part"), [("text", "texts"), ("image", "images"), ("pair_text", "pairs"), ("pair_image", "pairs")]
)
def test_a_share_that_no_part_uses_is_refused(key, part):
    parts = {name: section for name, section in PARTS.items() if name != part}
    sources = {name: CAPTION_DATA["sources"][name] for section in parts.values() for name in section["sources"]}
    changes = {
        # One of these parts has objective caption, which hides nothing, so it uses none of the shares.
        "data__parts": parts,
        "data__sources": sources,
        "train__micro_batch_size": sum(section["micro_batch_size"] for section in parts.values()),
        "model__encoder__d_match": None,
        "model__moe": None,
        "start": {"from": "pretrained"},
    }
    encoder_spec(**changes)
    with pytest.raises(ValidationError, match=f"train.masking.{key} is 0.3, but no part with objective masked has"):
        encoder_spec(**changes, train__masking={key: 0.3})


def one_part_changes(*columns):
    """Return changes that leave a spec one part with these columns: pairs to match, or images or texts to mask."""
    objective = "contrastive" if len(columns) > 1 else "masked"
    return {
        "data__sources": {"drawings": {"path": "raw", "format": "webdataset", "columns": list(columns)}},
        "data__parts": {"drawings": {"sources": ["drawings"], "micro_batch_size": 4, "objective": objective}},
        "train__micro_batch_size": 4,
        "model__encoder__d_match": 8 if len(columns) > 1 else None,
        "model__moe": None,
    }


def test_an_encoder_may_learn_from_pairs_without_masks():
    assert encoder_spec(**one_part_changes("image", "text")).start is None


@pytest.mark.parametrize("column", ["image", "text"])
def test_an_encoder_of_one_modality_is_refused_unless_its_start_has_both(column):
    with pytest.raises(ValidationError, match="an encoder needs parts with images and with texts, or with pairs"):
        encoder_spec(**one_part_changes(column))
    encoder_spec(**one_part_changes(column), start={"from": "pretrained"})


def test_a_codebook_that_no_part_predicts_is_refused():
    changes = one_part_changes("image", "text")
    with pytest.raises(ValidationError, match="image_targets is codebook, but no part with objective masked has"):
        encoder_spec(**changes, model__encoder__image_targets="codebook")


@pytest.mark.parametrize(
    ("part", "source", "reason"),
    [
        ("answer", "sentences", "part answer is answer, so its samples need class, image, text, but data.sources.sent"),
        ("compare", "questions", "but data.sources.questions has class, image, text: name a source of format nlvr2"),
        ("pairs", "sentences", "data.sources.sentences has two images in a sample, but part pairs is masked, which"),
        ("pairs", "questions", "data.sources.questions has class for vision models: set its columns"),
    ],
)
def test_a_part_gets_the_samples_that_its_objective_reads(part, source, reason):
    own_source = QUESTIONS["data__parts"][part]["sources"][0]
    swapped = {own_source: source, source: own_source}
    parts = {
        name: {**section, "sources": [swapped.get(name, name) for name in section["sources"]]}
        for name, section in QUESTIONS["data__parts"].items()
    }
    # The part that is checked comes first.
    parts = {part: parts[part], **parts}
    with pytest.raises(ValidationError, match=reason):
        encoder_spec(**QUESTIONS | {"data__parts": parts})


@pytest.mark.parametrize("key", ["answers", "compares"])
def test_a_head_and_its_objective_come_together(key):
    encoder = QUESTIONS["model__encoder"]
    with pytest.raises(ValidationError, match=f"model.encoder.{key} is missing: set both or none"):
        encoder_spec(**QUESTIONS | {"model__encoder": {name: v for name, v in encoder.items() if name != key}})
    with pytest.raises(ValidationError, match=f"model.encoder.{key} is given, but no part of data.parts is"):
        encoder_spec(**{f"model__encoder__{key}": 2 if key == "answers" else True})
