"""Tests of the plot of a sweep, with synthetic measurements."""

import pytest
import torch

from mhmoe_ray.bench.layers import LayerShape, our_layers
from mhmoe_ray.bench.measure import LayerFigures, LayerRequest
from mhmoe_ray.bench.plot import draw_plot, layer_styles, plot
from mhmoe_ray.bench.sweep import AxisSweep
from mhmoe_ray.bench.timing import Hardware

SHAPE = LayerShape(32, 48, 4, 2, 96)
REQUEST = LayerRequest(SHAPE, [2, 3], "bfloat16", 3, static=True)
HARDWARE = Hardware(torch.device("cpu"), "A processor", 2)


def _is_dashed(line):
    return line.get_linestyle() != "-"


def _make_sweep():
    layers, _ = our_layers(SHAPE, [2, 3], True, ["auto"], torch.device("cpu"))
    cases = [(layer.name, layer.moe, None) for layer in layers] + [
        ("transformers eager", SHAPE.plain_moe, "transformers 5")
    ]

    def make_figures(point):
        return [
            LayerFigures(
                name,
                moe,
                package,
                (i + 1) * point * 1e-5,
                [],
                (i + 1) * point * 1000,
                0,
                "static" in name and point == 2048,
            )
            for i, (name, moe, package) in enumerate(cases)
        ]

    return AxisSweep("tokens", {point: make_figures(point) for point in (512, 1024, 2048)}, [])


def test_panels_show_all_layers_and_dash_extrapolated_points():
    sweep = _make_sweep()
    figure = draw_plot(sweep, REQUEST, HARDWARE)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(sweep.series)
    values = {
        "time (s)": lambda f, dense: f.median,
        "time, ratio to dense": lambda f, dense: f.median / dense.median,
        "peak memory (GB)": lambda f, dense: f.peak_bytes / 1e9,
    }
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(values)
    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_marker() != "None"]
        measured_lines = [line for line in lines if not _is_dashed(line)]
        extrapolated_lines = [line for line in lines if _is_dashed(line)]
        assert len(measured_lines) == len(sweep.series)
        assert [list(line.get_xdata()) for line in extrapolated_lines] == [[1024, 2048]] * 2
        value = values[axes.get_title(loc="left")]
        for line, layer_figures in zip(measured_lines, sweep.series.values(), strict=True):
            expected = [
                value(f, sweep.series["dense"][point]) for point, f in layer_figures.items() if not f.is_extrapolated
            ]
            assert list(line.get_ydata()) == pytest.approx(expected)
    text = figure.get_suptitle()
    for part in ("A processor, 2 threads", "bfloat16", "d 48, E 4, k 2, f 96", "dashed: not measured"):
        assert part in text
    assert "T 32" not in text  # the title leaves out T, which the axis shows


def test_layers_have_different_styles():
    styles = layer_styles(_make_sweep().series)
    assert len(set(styles.values())) == len(styles)
    assert styles["SMoE static"].colour == styles["SMoE"].colour
    assert styles["MH-MoE h 2"].colour != styles["MH-MoE h 3"].colour


def test_plot_writes_png(tmp_path):
    path = tmp_path / "sweep.png"
    plot(_make_sweep(), REQUEST, HARDWARE, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
