"""Tests that measured losses, bytes and routes equal those counted one token at a time."""

import numpy as np
import pytest
import torch

from mhmoe_ray.data.tokenizer import UNKNOWN_WIDTH
from mhmoe_ray.evaluate.measure import DomainSamples
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from tests.evaluate.measurements import WIDTHS, measure
from tests.support.specs import tiny_spec


def make_model(**moe):
    spec = tiny_spec(model={"moe": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 24, **moe}})
    model = Decoder(spec.model)
    init_weights(model, 0)
    return model.requires_grad_(False).eval()


def make_samples(domain, count, seed):
    generator = np.random.default_rng(seed)
    return DomainSamples(domain, generator.integers(300, size=(count, 17)), generator.random((count, 16)) < 0.8)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_measure_samples_equals_counting_by_hand(heads, top_k):
    model = make_model(heads=heads, top_k=top_k)
    samples = [make_samples("web/a", 5, 0), make_samples("web/b", 3, 1)]
    scores, routing = measure(model, samples, batch=2)
    assert scores.keys() == routing.keys() == {"web/a", "web/b"}
    for domain, tokens, target_mask, _ in samples:
        nats, size = 0.0, 0
        expected_counts = [
            np.zeros((4,), int),
            np.zeros((4,), int),
            np.zeros(heads * top_k + 1, int),
            np.zeros((heads, heads), int),
        ]
        first_weight = 0.0
        for row, mask in zip(tokens, target_mask, strict=True):
            ids = torch.from_numpy(row)[None]
            with torch.inference_mode():
                output = model(ids[:, :-1])
            logprob = output.logits_BTV[0].double().log_softmax(-1)
            [routing_of_row] = output.routing
            for position in np.flatnonzero(mask):
                nats -= float(logprob[position, row[position + 1]])
                size += int(WIDTHS[row[position + 1]])
                expert_choices = [routing_of_row.expert_NK[position * heads + h].tolist() for h in range(heads)]
                for expert in (e for choice in expert_choices for e in choice):
                    expected_counts[0][expert] += 1
                for expert in {e for choice in expert_choices for e in choice}:
                    expected_counts[1][expert] += 1
                expected_counts[2][len({e for choice in expert_choices for e in choice})] += 1
                for i in range(heads):
                    for j in range(heads):
                        expected_counts[3][i, j] += expert_choices[i][0] == expert_choices[j][0]
                    first_weight += float(routing_of_row.gate_NK[position * heads + i, 0])
        score, counts = scores[domain], routing[domain]
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert (score.tokens, score.text_bytes) == (target_mask.sum(), size)
        assert score.bits_per_byte == pytest.approx(nats / np.log(2) / size, rel=1e-5)
        assert counts.tokens == target_mask.sum()
        assert [counts.counts, counts.tokens_of, counts.distinct, counts.agreement] == [
            [w.tolist()] for w in expected_counts
        ]
        assert counts.first_weight == pytest.approx([first_weight], rel=1e-5)


def test_measure_samples_of_a_dense_model_has_no_routes():
    spec = tiny_spec(model={"moe": None})
    model = Decoder(spec.model)
    init_weights(model, 0)
    scores, routing = measure(model.eval(), [make_samples("web", 2, 0)], batch=2)
    assert scores["web"].loss > 0
    assert routing == {}


def test_bits_per_byte_is_none_with_unknown_tokens():
    samples = [make_samples("web", 4, 0), make_samples("other", 4, 1)]
    [(_, tokens, target_mask, _), _] = samples
    target_tokens = {
        int(row[position + 1])
        for row, mask in zip(tokens, target_mask, strict=True)
        for position in np.flatnonzero(mask)
    }
    widths = WIDTHS.copy()
    widths[next(token for token in target_tokens if WIDTHS[token])] = UNKNOWN_WIDTH
    known_score = measure(make_model(), samples, batch=4)[0]["web"]
    score = measure(make_model(), samples, batch=4, widths=widths)[0]["web"]
    assert known_score.bits_per_byte is not None
    assert (score.nats, score.tokens) == (known_score.nats, known_score.tokens)
    assert score.unknown > 0
    assert score.text_bytes < known_score.text_bytes
    assert score.bits_per_byte is None
    assert Score(nats=3.0, tokens=2, text_bytes=0).bits_per_byte is None


def test_measure_samples_drops_no_sub_tokens():
    model, narrow_model = make_model(), make_model(capacity_factor=0.25)
    losses = [
        measure(measured_model, [make_samples("web", 4, 0)], batch=4)[0]["web"].nats
        for measured_model in (model, narrow_model)
    ]
    assert losses[0] == losses[1]


def test_a_score_without_targets_has_no_loss():
    masked_samples = make_samples("web", 2, 0)._replace(target_mask=np.zeros((2, 16), bool))
    score = measure(make_model(), [masked_samples], batch=2)[0]["web"]
    assert score.tokens == 0
    assert np.isnan(score.loss)
    assert (score.perplexity, score.bits_per_byte) == (None, None)
