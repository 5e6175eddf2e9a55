"""Tests of the section `model.vision`: mistakes that are refused, and the losses and tokens of its tasks."""

import pytest
from pydantic import ValidationError

from mhmoe_ray.spec import RunSpec
from tests.support.specs import TINY, with_changes
from tests.support.visions import vision_spec

DETECT = "model__vision__tasks__detect"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__vision__patch_size": 5}, "must be a multiple of patch_size"),
        ({f"{DETECT}__detector__scales": [0.3]}, "a scale is 4, 2, 1 or 0.5"),
        ({f"{DETECT}__detector__scales": [1, 2]}, "each of the scales must be half of the one before it"),
        ({f"{DETECT}__detector__scales": [4, 1]}, "each of the scales must be half of the one before it"),
        ({"model__vision__patch_size": 2, f"{DETECT}__detector__scales": [4, 2]}, "detector.scales has 4, but a patch"),
        ({f"{DETECT}__image_size": 36, f"{DETECT}__detector__scales": [0.5]}, "cannot be halved"),
        ({"model__vocab_size": 300}, "vocab_size would be ignored"),
        ({"model__encoder": {"image_size": 16, "patch_size": 4, "text_positions": 4}}, "both encoder and vision"),
        (
            {"model__moe__router": "smear", "model__moe__heads": 1, "model__moe__top_k": 1},
            "for an encoder|vision|encoder",
        ),
        ({"model__vision__adaptive": {"largest": 5}}, "between moe.top_k"),
        ({f"{DETECT}__pooling": "class_token"}, "pooling class_token is for classification"),
        ({f"{DETECT}__rate_ratio": 0}, "greater than 0"),
        ({"model__attention_heads": 5}, "must be a multiple of attention_heads"),
        ({"model__backbone": "vit", "model__moe__kernel": "grouped_gemm"}, "of backbone llama or subln only"),
        ({"model__backbone": "vit", "model__vision": None}, "only vision models can have it"),
        (
            {"model__moe__groups": 2, "model__vision__adaptive": {"largest": 3}},
            r"moe.top_groups \(1\) leaves a row 2 experts",
        ),
        (
            {"model__moe__top_k": 1, "model__vision__adaptive": {"largest": 2, "rule": "coded"}},
            "may lower a task to 0 experts, which must be at least 1",
        ),
        (
            {"model__moe__normalize_gates": True, "model__vision__adaptive": {"largest": 3, "rule": "coded"}},
            "may lower a task to 1 experts, which must be at least 2",
        ),
        ({"cluster": {"strategy": "zero3"}}, "a detector does not run on a worker without images"),
        ({"model__moe": None, "model__vision__adaptive": {"largest": 2}}, "model.moe is missing"),
        ({"data__seq_len": 12}, "data.seq_len is for texts"),
        ({"data__parts__detect__objective": "classify"}, "its task is detect"),
        ({"data__sources__scenes__columns": ["image", "text"]}, "needs sources with image and objects"),
        ({"data__sources__drawings__columns": ["class", "image", "objects"]}, "image and one of the two"),
        ({"data__sources__drawings__format": "coco"}, "columns has class"),
        ({"train__masking": {"text": 0.5}}, "train.masking is for a model with an encoder"),
        ({"train__loss_chunk_rows": 8}, "loss_chunk_rows is for decoders"),
        ({"start": {"from": "run"}}, "start is for decoders and encoders"),
    ],
)
def test_mistakes_are_refused_with_their_reason(changes, message):
    with pytest.raises(ValidationError, match=message):
        vision_spec(**changes)


def test_tasks_and_parts_must_have_the_same_names():
    with pytest.raises(ValidationError, match=r"tasks are classify, detect, but data.parts are detect, other"):
        vision_spec(
            data__parts={
                "detect": {"sources": ["scenes"], "micro_batch_size": 2},
                "other": {"sources": ["drawings"], "micro_batch_size": 3},
            }
        )


def test_a_decoder_still_needs_a_vocabulary_and_a_length():
    for key in ("model__vocab_size", "data__seq_len"):
        tree = with_changes(TINY, {key: 0})
        with pytest.raises(ValidationError, match=f"{key.partition('__')[2]} is missing"):
            RunSpec.model_validate(tree)


def test_parts_have_the_order_of_the_tasks_and_their_losses():
    parts = {
        "detect": {"sources": ["scenes"], "micro_batch_size": 2},
        "classify": {"sources": ["drawings"], "micro_batch_size": 3},
    }
    spec = vision_spec(data__parts=parts)
    assert spec.loss_names == [
        "classify",
        *(f"detect_{kind}" for kind in ("objectness", "proposals", "classes", "boxes", "masks")),
    ]
    without_masks = vision_spec(model__vision__tasks__detect__detector__masks=False)
    assert "detect_masks" not in without_masks.loss_names
    # 3 images of 16 patches, and 2 of 64.
    assert spec.tokens_per_micro_batch == 3 * 16 + 2 * 64
    assert spec.attention_length == (3 * 16**2 + 2 * 64**2) / (3 * 16 + 2 * 64)
