"""The same run on one process and spread over several: gradients, losses, weights."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.specs import tiny_spec
from tests.train import jobs

STEPS = 20


def spread(workers, ep, **sections):
    return tiny_spec(cluster={"workers": workers, "ep": ep}, **sections)


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, jobs.gradients_then_losses, spread(1, 1), STEPS)[0]


@pytest.mark.parametrize(
    ("workers", "ep", "nodes"),
    [
        pytest.param(2, 2, None, id="world2-ep2"),
        pytest.param(2, 1, None, id="world2-ep1"),
        pytest.param(4, 2, None, id="world4-ep2", marks=pytest.mark.slow),
        pytest.param(4, 2, ["a", "b", "b", "a"], id="world4-ep2-regrouped-by-node"),
        pytest.param(4, 4, None, id="world4-ep4"),
    ],
)
def test_any_spread_of_experts_trains_alike(alone, workers, ep, nodes):
    for found in run_ranks(workers, jobs.gradients_then_losses, spread(workers, ep), STEPS, nodes):
        for name, expected in alone["gradients"].items():
            error = (found["gradients"][name] - expected).norm() / expected.norm()
            assert error < 1e-5, f"gradient of {name}"
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        # What clipping divides by, which Adam would hide.
        assert found["norms"][0] == pytest.approx(alone["norms"][0], rel=1e-5)
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-3)
        for name, expected in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], expected, atol=1e-3, rtol=1e-3, msg=name)


FIRST_PAPER = {
    "backbone": "subln",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "moe": {
        "router": "xmoe_torchscale",
        "normalize_gates": True,
        "second_expert": "random",
        "capacity_factor": 1.0,
        "z_weight": 0.01,
    },
}
OTHERS = {
    "moe": {
        "router": "xmoe",
        "bias_rate": 0.01,
        "jitter": 0.1,
        "d_shared": 16,
        "sub_token_residual": True,
        "balance_choices": "all",
    },
}


@pytest.mark.parametrize("model", [FIRST_PAPER, OTHERS], ids=["first-paper", "others"])
def test_routing_with_drops_noise_and_biases_is_the_same_on_any_number_of_ranks(model):
    """Capacity, draws and balance belong to a micro-batch, wherever it is computed; a bias to the whole step."""
    base = tiny_spec().model.model_dump()
    merged = {"model": {**base, **model, "moe": {**base["moe"], **model["moe"]}}}
    [alone] = run_ranks(1, jobs.gradients_then_losses, spread(1, 1, **merged), 8)
    for found in run_ranks(2, jobs.gradients_then_losses, spread(2, 2, **merged), 8):
        for name, expected in alone["gradients"].items():
            assert (found["gradients"][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert found["weights"].keys() == alone["weights"].keys()
        for name, expected in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], expected, atol=1e-3, rtol=1e-3, msg=name)
    biases = [t for name, t in alone["weights"].items() if name.endswith("bias_E")]
    assert all(b.any() for b in biases)
    assert len(biases) == ("bias_rate" in model["moe"])


def test_losses_fall_and_gradients_are_not_zero(alone):
    assert all(g.norm() > 0 for g in alone["gradients"].values())
    assert alone["losses"][-1] < alone["losses"][0] - 2


def test_bfloat16_stays_near_float32(alone):
    spec = spread(2, 2, train={"precision": "bfloat16"})
    for found in run_ranks(2, jobs.gradients_then_losses, spec, STEPS):
        assert found["losses"] == pytest.approx(alone["losses"], abs=0.05)


def test_a_rank_whose_experts_get_no_rows_takes_part():
    first, second = run_ranks(2, jobs.nothing_to_do, spread(2, 2))
    for found in (first, second):
        assert not found["counts"][:, :2].any()
        assert found["counts"][:, 2:].all()
        assert all(torch.isfinite(w).all() for w in found["weights"])


def test_validation_is_the_same_on_any_world_and_counts_each_target_once():
    g = torch.Generator().manual_seed(0)
    token = torch.randint(300, (7, 17), generator=g)  # 7 samples do not divide evenly
    counts = torch.rand(7, 16, generator=g) < 0.8
    expected = run_ranks(1, jobs.validation_loss, spread(1, 1), token, counts)[0]
    assert expected[1] == int(counts.sum())
    for found in run_ranks(4, jobs.validation_loss, spread(4, 2), token, counts):
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        assert found[1] == expected[1]
