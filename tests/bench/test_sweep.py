import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.bench import measure, timing
from mhmoe_ray.bench.layers import Shape
from mhmoe_ray.bench.measure import Request
from mhmoe_ray.bench.sweep import by_law, exponent, spread, sweep
from mhmoe_ray.errors import SpecError

TINY = Shape(tokens=32, d_model=16, experts=4, top_k=2, d_expert=32)
WHERE = timing.find("cpu")


@given(st.floats(0, 1e9), st.floats(1e-9, 1e3))
def test_the_law_is_found_from_exact_points(a, b):
    def law(t):
        return a * t + b * t**2

    known = [(t, law(t)) for t in (1024, 2048, 4096, 8192)]
    assert by_law(known, 65536) == pytest.approx(law(65536), rel=1e-6)
    assert by_law(known[:2], 65536) == pytest.approx(law(65536), rel=1e-6)
    # Proportional to what is known.
    assert by_law([(t, 3 * y) for t, y in known], 65536) == pytest.approx(3 * law(65536), rel=1e-6)


def test_the_law_is_of_the_largest_points():
    known = [(t, 5 * t + 2 * t**2) for t in (512, 1024, 2048)]
    assert by_law([*known, (8, 1e9)], 4096) == pytest.approx(5 * 4096 + 2 * 4096**2)


def test_one_point_is_taken_to_be_all_square():
    assert by_law([(10, 7.0)], 40) == pytest.approx(7 * 16)


@pytest.mark.parametrize(("growth", "power"), [(1.5, 1), (6, 2)])
def test_neither_part_of_the_law_is_negative(growth, power):
    """Twice the tokens cost less than twice as much, or more than four times, so that a free fit would make a part
    negative."""
    exactly = [(1024, 1.0), (2048, growth)]
    low, high = sorted((1.0, growth / 2**power))
    assert low * 64**power <= by_law(exactly, 65536) <= high * 64**power


@given(st.floats(0.1, 3), st.floats(1e-6, 1e3))
def test_exponent_of_a_power(p, c):
    points = [(t, c * t**p) for t in (8, 16, 64, 1024)]
    assert exponent(points) == pytest.approx(p, abs=1e-6)


def test_spread_is_how_far_the_largest_is_above_the_smallest():
    assert spread([(8, 2.0), (16, 2.5), (32, 1.0)]) == pytest.approx(1.5)


def test_tokens_static_routing_is_drawn_on_and_the_rest_measured(monkeypatch):
    monkeypatch.setattr(measure, "STATIC_ROWS", 256)
    said = []
    found = sweep(Request(TINY, [2], "float32", 1, static=True), "tokens", [512, 64, 128, 256], WHERE, said.append)
    assert said[0] == "tokens 64: 7 layers, 1 rounds"
    assert len(said) == len(found.points) == 4
    assert list(found.points) == [64, 128, 256, 512]
    assert not found.absent
    beyond = {name: [at for at, f in along.items() if f.extrapolated] for name, along in found.series.items()}
    assert beyond.pop("SMoE static") == [512]
    assert beyond.pop("MH-MoE h 2 static") == [256, 512]
    assert set(beyond) == {"dense", "SMoE", "X-MoE", "MH-MoE h 2", "fine-grained"}
    assert not any(beyond.values())
    assert set(found.growth) == set(found.series)
    for along in found.series.values():
        assert list(along) == [64, 128, 256, 512]
        assert all(f.seconds if not f.extrapolated else not f.seconds for f in along.values())
    # Bytes can be known: the law, from up to 256 rows, against what 512 take.
    monkeypatch.setattr(measure, "STATIC_ROWS", 1024)
    measured = sweep(Request(TINY, [2], "float32", 1, static=True), "tokens", [512], WHERE, said.append)
    for name in ("SMoE static", "MH-MoE h 2 static"):
        assert found.series[name][512].peak == pytest.approx(measured.series[name][512].peak, rel=0.1)


@pytest.mark.parametrize(("over", "points"), [("experts", [4, 8]), ("top-k", [1, 2]), ("heads", [1, 2, 4])])
def test_each_axis_changes_what_it_says(over, points):
    found = sweep(Request(TINY, [2], "float32", 1, static=True), over, points, WHERE, lambda line: None)
    series = found.series
    multi = "MH-MoE" if over == "heads" else "MH-MoE h 2"
    assert list(series) == ["dense", "SMoE", "X-MoE", multi, "fine-grained", "SMoE static", f"{multi} static"]
    of = {at: f.moe for at, f in series[multi if over == "heads" else "SMoE"].items()}
    key = {"experts": "experts", "top-k": "top_k", "heads": "heads"}[over]
    assert {at: getattr(moe, key) for at, moe in of.items()} == {at: at for at in points}
    if over == "heads":  # one head is the plain layer
        assert series["MH-MoE"][1].moe == series["SMoE"][1].moe
    assert set(found.growth) == set(series)
    assert np.isfinite(list(found.growth.values())).all()


def test_growth_is_of_measured_points_alone(monkeypatch):
    monkeypatch.setattr(measure, "STATIC_ROWS", 32)
    found = sweep(Request(TINY, [2], "float32", 1, static=True), "tokens", [16, 32, 64, 128], WHERE, lambda line: None)
    assert "SMoE static" in found.growth  # 16 and 32
    assert "MH-MoE h 2 static" not in found.growth  # 16 alone
    known = [(at, found.series["SMoE static"][at].median) for at in (16, 32)]
    assert found.growth["SMoE static"] == pytest.approx(exponent(known))


def test_a_point_that_cannot_be_is_refused_before_any_is_measured():
    said = []
    with pytest.raises(SpecError, match="does not split"):
        sweep(Request(TINY, [2], "float32", 1), "heads", [1, 3], WHERE, said.append)
    assert not said
