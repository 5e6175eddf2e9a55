"""Losses, bytes and routes of a model against counting one token at a time."""

import numpy as np
import pytest
import torch

from mhmoe_ray.data.tokenizer import UNKNOWN
from mhmoe_ray.evaluate import measure as measuring
from mhmoe_ray.evaluate.measure import DomainSamples
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from tests.specs import tiny_spec

WIDTHS = np.arange(300) % 5


def measure(model, samples, batch, widths=WIDTHS):
    return measuring.measure(
        model, samples, widths, batch=batch, start_token=0, half=False, on_progress=lambda *_: None
    )


def model_of(**moe):
    spec = tiny_spec(model={"moe": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 24, **moe}})
    model = Decoder(spec.model)
    init_weights(model, 0)
    return model.requires_grad_(False).eval()


def samples_of(domain, count, seed):
    g = np.random.default_rng(seed)
    return DomainSamples(domain, g.integers(300, size=(count, 17)), g.random((count, 16)) < 0.8)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_is_what_counting_by_hand_gives(heads, top_k):
    model = model_of(heads=heads, top_k=top_k)
    samples = [samples_of("web/a", 5, 0), samples_of("web/b", 3, 1)]
    scores, routing = measure(model, samples, batch=2)
    assert scores.keys() == routing.keys() == {"web/a", "web/b"}
    for domain, tokens, counts in samples:
        nats, size = 0.0, 0
        want = [
            np.zeros((4,), int),
            np.zeros((4,), int),
            np.zeros(heads * top_k + 1, int),
            np.zeros((heads, heads), int),
        ]
        first = 0.0
        for row, real in zip(tokens, counts, strict=True):
            ids = torch.from_numpy(row)[None]
            with torch.inference_mode():
                output = model(ids[:, :-1])
            logprob = output.logits_BTV[0].double().log_softmax(-1)
            [routed] = output.routing
            for at in np.flatnonzero(real):
                nats -= float(logprob[at, row[at + 1]])
                size += int(WIDTHS[row[at + 1]])
                chosen = [routed.expert_NK[at * heads + h].tolist() for h in range(heads)]
                for expert in (e for one in chosen for e in one):
                    want[0][expert] += 1
                for expert in {e for one in chosen for e in one}:
                    want[1][expert] += 1
                want[2][len({e for one in chosen for e in one})] += 1
                for i in range(heads):
                    for j in range(heads):
                        want[3][i, j] += chosen[i][0] == chosen[j][0]
                    first += float(routed.gate_NK[at * heads + i, 0])
        score, counted = scores[domain], routing[domain]
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert (score.tokens, score.text_bytes) == (counts.sum(), size)
        assert score.bits_per_byte == pytest.approx(nats / np.log(2) / size, rel=1e-5)
        assert counted.tokens == counts.sum()
        assert [counted.counts, counted.tokens_of, counted.distinct, counted.agreement] == [[w.tolist()] for w in want]
        assert counted.first_weight == pytest.approx([first], rel=1e-5)


def test_a_dense_model_has_losses_and_no_routes():
    spec = tiny_spec(model={"moe": None})
    model = Decoder(spec.model)
    init_weights(model, 0)
    scores, routing = measure(model.eval(), [samples_of("web", 2, 0)], batch=2)
    assert scores["web"].loss > 0
    assert routing == {}


def test_bits_per_byte_are_not_known_where_a_token_stands_for_any_text():
    samples = [samples_of("web", 4, 0), samples_of("other", 4, 1)]
    [(_, tokens, counts), _] = samples
    inside = {int(row[at + 1]) for row, real in zip(tokens, counts, strict=True) for at in np.flatnonzero(real)}
    widths = WIDTHS.copy()
    widths[next(token for token in inside if WIDTHS[token])] = UNKNOWN
    known = measure(model_of(), samples, batch=4)[0]["web"]
    score = measure(model_of(), samples, batch=4, widths=widths)[0]["web"]
    assert known.bits_per_byte is not None
    assert (score.nats, score.tokens) == (known.nats, known.tokens)
    assert score.unknown > 0
    assert score.text_bytes < known.text_bytes
    assert score.bits_per_byte is None
    assert Score(nats=3.0, tokens=2, text_bytes=0).bits_per_byte is None


def test_static_routing_drops_nothing_here_as_in_serving():
    model, narrow = model_of(), model_of(capacity_factor=0.25)
    found = [measure(m, [samples_of("web", 4, 0)], batch=4)[0]["web"].nats for m in (model, narrow)]
    assert found[0] == found[1]
