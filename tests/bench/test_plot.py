"""The plot of a sweep, drawn from made-up figures."""

import pytest
import torch

from mhmoe_ray.bench.layers import Shape, our_layers
from mhmoe_ray.bench.measure import Figures, Request
from mhmoe_ray.bench.plot import picture, plot, styles_of
from mhmoe_ray.bench.sweep import Sweep
from mhmoe_ray.bench.timing import Hardware

SHAPE = Shape(32, 48, 4, 2, 96)
REQUEST = Request(SHAPE, [2, 3], "bfloat16", 3, static=True)
WHERE = Hardware(torch.device("cpu"), "A processor", 2)


def _dashed(line):
    return line.get_linestyle() != "-"


def _swept():
    layers, _ = our_layers(SHAPE, [2, 3], True, ["auto"], torch.device("cpu"))
    given = [(layer.name, layer.moe, None) for layer in layers] + [
        ("transformers eager", SHAPE.plain, "transformers 5")
    ]

    def figures(at):
        return [
            Figures(
                name, moe, package, (i + 1) * at * 1e-5, [], (i + 1) * at * 1000, 0, "static" in name and at == 2048
            )
            for i, (name, moe, package) in enumerate(given)
        ]

    return Sweep("tokens", {at: figures(at) for at in (512, 1024, 2048)}, [])


def test_every_layer_is_in_every_panel_and_only_what_was_not_measured_is_dashed():
    swept = _swept()
    figure = picture(swept, REQUEST, WHERE)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(swept.series)
    values = {
        "time (s)": lambda f, dense: f.median,
        "time, ratio to dense": lambda f, dense: f.median / dense.median,
        "peak memory (GB)": lambda f, dense: f.peak / 1e9,
    }
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(values)
    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_marker() != "None"]
        measured = [line for line in lines if not _dashed(line)]
        beyond = [line for line in lines if _dashed(line)]
        assert len(measured) == len(swept.series)
        assert [list(line.get_xdata()) for line in beyond] == [[1024, 2048]] * 2
        value = values[axes.get_title(loc="left")]
        for line, along in zip(measured, swept.series.values(), strict=True):
            expected = [value(f, swept.series["dense"][at]) for at, f in along.items() if not f.extrapolated]
            assert list(line.get_ydata()) == pytest.approx(expected)
    text = figure.get_suptitle()
    for part in ("A processor, 2 threads", "bfloat16", "d 48, E 4, k 2, f 96", "dashed: not measured"):
        assert part in text
    assert "T 32" not in text  # the axis has it


def test_layers_can_be_told_apart():
    styles = styles_of(_swept().series)
    assert len(set(styles.values())) == len(styles)
    assert styles["SMoE static"].colour == styles["SMoE"].colour
    assert styles["MH-MoE h 2"].colour != styles["MH-MoE h 3"].colour


def test_a_file_is_written(tmp_path):
    path = tmp_path / "sweep.png"
    plot(_swept(), REQUEST, WHERE, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
