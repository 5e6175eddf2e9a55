"""Tests of the heads that answer questions and judge sentences: inputs, losses, sizes and initial values."""

import numpy as np
import pytest
import torch
from torch import nn

from mhmoe_ray.families.encoder.data.batches import BatchMaker
from mhmoe_ray.families.encoder.model.heads import soft_scores
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.planner.sizes import compute_sizes
from tests.support.encoders import QUESTIONS, encoder_batch, encoder_spec, part_samples

SPEC = encoder_spec(**QUESTIONS)
ANSWER, COMPARE = SPEC.parts[1:]


@pytest.fixture(scope="module")
def model():
    model = build_model(SPEC.model)
    init_weights(model, 0)
    return model.eval().requires_grad_(False)


def losses(model, part, samples):
    """Return the loss of each sample of a part that is a micro-batch of its own."""
    maker = BatchMaker(SPEC.model, torch.device("cpu"))
    return model(maker.make([part._replace(samples=len(samples.labels))], samples)).losses[0].value_I


def test_soft_scores_are_those_of_the_released_preparation():
    labels = torch.tensor([[0, 1, 1, 2, 2, 2, 3, 3, 3, 3], [4] * 5 + [-1] * 5, [-1] * 10])
    expected = torch.tensor([[0.3, 0.6, 0.9, 1, 0], [0, 0, 0, 0, 1], [0] * 5])
    torch.testing.assert_close(soft_scores(labels, 5), expected)


def test_an_answer_is_computed_from_the_image_position_before_the_last_norm(model):
    samples = part_samples(SPEC, ANSWER, 1)
    batch = BatchMaker(SPEC.model, torch.device("cpu")).make([ANSWER], samples)
    raw = {}
    handle = model.image_norm.register_forward_pre_hook(lambda _, inputs: raw.update(image=inputs[0]))
    values = model(batch).losses[0].value_I
    handle.remove()
    norm, pool, _, wide, wide_norm, _, out = model.answer
    pooled = torch.tanh(pool(norm(raw["image"][:, 0])))
    logits = out(nn.functional.gelu(wide_norm(wide(pooled))))
    counts = np.array([[(row == k).sum() for k in range(5)] for row in samples.labels])
    scores = torch.from_numpy(np.array([0, 0.3, 0.6, 0.9, *[1.0] * 7])[counts])
    p = torch.sigmoid(logits.double())
    expected = -(scores * p.log() + (1 - scores) * (1 - p).log()).mean(1) * 5
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_sentence_is_judged_by_both_of_its_pairs(model):
    samples = part_samples(SPEC, COMPARE, 2)
    batch = BatchMaker(SPEC.model, torch.device("cpu")).make([COMPARE], samples)
    encoded = model.encode(batch)
    rows = [
        torch.cat(
            [encoded.image_NSM[i, 0], encoded.text_NTM[i, 0], encoded.image_NSM[i + 1, 0], encoded.text_NTM[i + 1, 0]]
        )
        for i in range(0, 8, 2)
    ]
    logits = model.compare(torch.stack(rows))
    expected = torch.logsumexp(logits, 1) - logits[range(4), samples.labels[:, 0].tolist()]
    torch.testing.assert_close(model(batch).losses[0].value_I, expected)


def test_questions_and_sentences_do_not_influence_each_other(model):
    """Each has the same loss alone as in a micro-batch with all parts, and another one with another image."""
    expected = dict(zip(SPEC.loss_names, model(encoder_batch(SPEC)).losses, strict=True))
    for number, part in ((1, ANSWER), (2, COMPARE)):
        samples = part_samples(SPEC, part, number)
        singles = [losses(model, part, samples.rows(i, i + 1)) for i in range(part.samples)]
        torch.testing.assert_close(torch.cat(singles), expected[part.name].value_I, rtol=1e-5, atol=1e-6)
        assert len(set(torch.cat(singles).tolist())) == part.samples


def test_the_heads_have_their_parameters_and_initial_values(model):
    d = SPEC.model.d_model
    answer = 2 * d + (d * d + d) + (2 * d * d + 2 * d) + 4 * d + (10 * d + 5)
    compare = 8 * d + (8 * d * d + 2 * d) + 4 * d + (4 * d + 2)
    assert sum(p.numel() for p in model.answer.parameters()) == answer
    assert sum(p.numel() for p in model.compare.parameters()) == compare
    assert sum(p.numel() for p in model.parameters()) == compute_sizes(SPEC.model).parameters
    bound = 1e-3 * (4 * d) ** -0.5
    assert 0.9 * bound < model.compare[1].weight.abs().max() <= bound
    assert 0.9 * d**-0.5 < model.answer[1].weight.abs().max() <= d**-0.5


def test_all_weights_have_gradients_and_an_empty_rank_has_no_loss():
    model = build_model(SPEC.model)
    init_weights(model, 0)
    sum(loss.sum for loss in model(encoder_batch(SPEC)).losses).backward()
    assert all(p.grad is not None for p in model.parameters())
    for part in (ANSWER, COMPARE):
        assert losses(model, part, part_samples(SPEC, part, 0).rows(0, 0)).shape == (0,)
