"""Tests of `mhmoe bench plan` at tiny sizes; no test judges a time."""

import pytest

from mhmoe_ray.bench.plan import (
    CALIBRATION_MODELS,
    MODELS,
    SETTINGS,
    SMALL,
    Calibration,
    PlanFigures,
    build_specs,
    calibrate,
    measure,
)

TINY = {
    "vocab_size": 32, "d_model": 16, "layers": 1, "attention_heads": 2,
    "moe": {"heads": 2, "experts": 4, "top_k": 1, "d_expert": 8, "every": 1},
}  # fmt: skip
CEILINGS = {
    1: {"float32_flops": 5e10, "memory_bandwidth": 2e10},
    2: {"float32_flops": 4e10, "memory_bandwidth": 1e10, "bandwidth": 1e9, "latency": 1e-3},
}


@pytest.mark.long
def test_real_ranks_train_each_setting_in_each_round():
    settings = {name: {**SETTINGS[name], **SMALL} for name in ("1 rank", "fsdp", "ep 2, by node")}
    specs = build_specs({"tiny": TINY}, settings)
    calibration_specs = build_specs({"plain": TINY}, {name: settings[name] for name in ("1 rank", "fsdp")})
    reports = []
    figures = measure(specs, calibration_specs, 2, reports.append)
    assert list(figures.estimated) == list(specs) == [("tiny", name) for name in settings]
    assert list(figures.measured) == [*calibration_specs, *specs]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in figures.measured.values())
    keys = {world: list(calibration.ceilings) for world, calibration in figures.calibrations.items()}
    assert keys == {world: list(ceilings) for world, ceilings in CEILINGS.items()}
    assert -1 <= figures.rank_correlation() <= 1
    assert len(reports) == 4


def test_models_of_the_calibration_are_not_judged():
    specs = build_specs(MODELS, SETTINGS)
    assert len(specs) == len(MODELS) * len(SETTINGS) - 3  # the dense model has no expert parallelism
    assert len({spec.samples_per_step for spec in specs.values()}) == 1
    assert not any(model in MODELS.values() for model in CALIBRATION_MODELS.values())


@pytest.mark.parametrize("world", [1, 2])
def test_calibration_finds_the_figures_with_which_steps_were_made(world):
    specs = build_specs(CALIBRATION_MODELS, {"": {"cluster.workers": world}}).values()
    expected = Calibration(CEILINGS[world], 0.5, 2e-5)
    calibration = calibrate([(spec, expected.estimate(spec)) for spec in specs], CEILINGS[world])
    assert calibration.flops_share == pytest.approx(0.5, rel=0.05)
    assert calibration.operation_seconds == pytest.approx(2e-5, rel=0.15)


def test_rank_correlation_is_that_of_medians_with_equal_ranks_for_equal_times():
    estimated = {("a", "1"): 1.0, ("a", "2"): 2.0, ("b", "1"): 2.0, ("b", "2"): 9.0}
    measured = dict(zip(estimated, ([1.0, 1.0, 8.0], [3.0], [4.0], [2.0]), strict=True))
    figures = PlanFigures({}, estimated, measured)
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 4, 2.
    assert figures.rank_correlation() == pytest.approx(1.5 / (4.5 * 5) ** 0.5)
    assert figures.rank_correlation("a") == pytest.approx(1)
    assert figures.rank_correlation("b") == pytest.approx(-1)
