import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.bench import measure, timing
from mhmoe_ray.bench.layers import LayerShape
from mhmoe_ray.bench.measure import LayerRequest
from mhmoe_ray.bench.sweep import extrapolate, fit_exponent, relative_spread, sweep
from mhmoe_ray.errors import SpecError

TINY = LayerShape(tokens=32, d_model=16, experts=4, top_k=2, d_expert=32)
HARDWARE = timing.find_hardware("cpu")


@given(st.floats(0, 1e9), st.floats(1e-9, 1e3))
def test_exact_points_determine_the_law(a, b):
    def law(t):
        return a * t + b * t**2

    points = [(t, law(t)) for t in (1024, 2048, 4096, 8192)]
    assert extrapolate(points, 65536) == pytest.approx(law(65536), rel=1e-6)
    assert extrapolate(points[:2], 65536) == pytest.approx(law(65536), rel=1e-6)
    # Three times the values must give three times the result.
    assert extrapolate([(t, 3 * y) for t, y in points], 65536) == pytest.approx(3 * law(65536), rel=1e-6)


def test_law_is_fitted_to_largest_points():
    points = [(t, 5 * t + 2 * t**2) for t in (512, 1024, 2048)]
    assert extrapolate([*points, (8, 1e9)], 4096) == pytest.approx(5 * 4096 + 2 * 4096**2)


def test_single_point_is_taken_as_quadratic():
    assert extrapolate([(10, 7.0)], 40) == pytest.approx(7 * 16)


@pytest.mark.parametrize(("growth", "power"), [(1.5, 1), (6, 2)])
def test_factors_of_law_are_not_negative(growth, power):
    """The law a t + b t^2 has no negative factor, even where an unconstrained fit would give one.

    Twice the tokens cost 1.5 times as much, which is less than linear growth, or 6 times as much, which is more than
    quadratic growth.
    """
    points = [(1024, 1.0), (2048, growth)]
    low, high = sorted((1.0, growth / 2**power))
    assert low * 64**power <= extrapolate(points, 65536) <= high * 64**power


@given(st.floats(0.1, 3), st.floats(1e-6, 1e3))
def test_fit_exponent_of_power(p, c):
    points = [(t, c * t**p) for t in (8, 16, 64, 1024)]
    assert fit_exponent(points) == pytest.approx(p, abs=1e-6)


def test_relative_spread_is_ratio_of_extremes():
    assert relative_spread([(8, 2.0), (16, 2.5), (32, 1.0)]) == pytest.approx(1.5)


def test_only_static_routing_is_extrapolated_over_tokens(monkeypatch):
    monkeypatch.setattr(measure, "STATIC_ROWS", 256)
    lines = []
    result = sweep(
        LayerRequest(TINY, [2], "float32", 1, static=True), "tokens", [512, 64, 128, 256], HARDWARE, lines.append
    )
    assert lines[0] == "tokens 64: 7 layers, 1 rounds"
    assert len(lines) == len(result.points) == 4
    assert list(result.points) == [64, 128, 256, 512]
    assert not result.skipped
    extrapolated_points = {
        name: [point for point, f in layer_figures.items() if f.is_extrapolated]
        for name, layer_figures in result.series.items()
    }
    assert extrapolated_points.pop("SMoE static") == [512]
    assert extrapolated_points.pop("MH-MoE h 2 static") == [256, 512]
    assert set(extrapolated_points) == {"dense", "SMoE", "X-MoE", "MH-MoE h 2", "fine-grained"}
    assert not any(extrapolated_points.values())
    assert set(result.growth) == set(result.series)
    for series_figures in result.series.values():
        assert list(series_figures) == [64, 128, 256, 512]
        assert all(f.seconds if not f.is_extrapolated else not f.seconds for f in series_figures.values())
    # Bytes do not vary between measurements, so the law that was fitted up to 256 rows must give the measured bytes at
    # 512 rows.
    monkeypatch.setattr(measure, "STATIC_ROWS", 1024)
    measured_sweep = sweep(LayerRequest(TINY, [2], "float32", 1, static=True), "tokens", [512], HARDWARE, lines.append)
    for name in ("SMoE static", "MH-MoE h 2 static"):
        assert result.series[name][512].peak_bytes == pytest.approx(
            measured_sweep.series[name][512].peak_bytes, rel=0.1
        )


@pytest.mark.parametrize(("axis", "points"), [("experts", [4, 8]), ("top-k", [1, 2]), ("heads", [1, 2, 4])])
def test_each_axis_changes_its_own_size(axis, points):
    result = sweep(LayerRequest(TINY, [2], "float32", 1, static=True), axis, points, HARDWARE, lambda line: None)
    series = result.series
    multi_head = "MH-MoE" if axis == "heads" else "MH-MoE h 2"
    assert list(series) == ["dense", "SMoE", "X-MoE", multi_head, "fine-grained", "SMoE static", f"{multi_head} static"]
    moe_by_point = {point: f.moe for point, f in series[multi_head if axis == "heads" else "SMoE"].items()}
    key = {"experts": "experts", "top-k": "top_k", "heads": "heads"}[axis]
    assert {value: getattr(moe, key) for value, moe in moe_by_point.items()} == {value: value for value in points}
    if axis == "heads":  # with one head, the multi-head layer is the plain layer
        assert series["MH-MoE"][1].moe == series["SMoE"][1].moe
    assert set(result.growth) == set(series)
    assert np.isfinite(list(result.growth.values())).all()


def test_growth_uses_measured_points_only(monkeypatch):
    monkeypatch.setattr(measure, "STATIC_ROWS", 32)
    result = sweep(
        LayerRequest(TINY, [2], "float32", 1, static=True), "tokens", [16, 32, 64, 128], HARDWARE, lambda line: None
    )
    assert "SMoE static" in result.growth  # measured at 16 and 32 tokens
    assert "MH-MoE h 2 static" not in result.growth  # measured at 16 tokens only
    measured_values = [(point, result.series["SMoE static"][point].median) for point in (16, 32)]
    assert result.growth["SMoE static"] == pytest.approx(fit_exponent(measured_values))


def test_impossible_point_is_refused_before_measuring():
    lines = []
    with pytest.raises(SpecError, match="does not split"):
        sweep(LayerRequest(TINY, [2], "float32", 1), "heads", [1, 3], HARDWARE, lines.append)
    assert not lines
