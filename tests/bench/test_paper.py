import pytest

from mhmoe_ray.bench.layers import LayerShape
from mhmoe_ray.bench.measure import LayerFigures
from mhmoe_ray.bench.steps import compare_with_paper

PLAIN = LayerShape().plain_moe


def _figures(name, median, **moe):
    return LayerFigures(name, PLAIN.model_copy(update=moe), None, median, [median], 0, 0)


def test_ratios_use_dropless_plain_layer_of_each_side():
    dense = LayerFigures("dense", None, None, 1.0, [1.0], 0, 0)
    rows = compare_with_paper(
        [
            dense,
            _figures("SMoE", 2.0),
            _figures("X-MoE", 2.0, router="xmoe"),
            _figures("MH-MoE h 2", 2.2, heads=2),
            _figures("MH-MoE h 2 static", 5.0, heads=2, capacity_factor=1.0),
            _figures("SMoE static", 3.0, capacity_factor=1.0),
            _figures("transformers eager", 4.0),
        ]
    )
    comparisons = {row.layer: (row.paper, row.papers_ratio, row.our_ratio) for row in rows}
    assert comparisons == {
        "SMoE": ("SMoE dynamic", 1.0, 1.0),
        "MH-MoE h 2": ("MH-MoE dynamic", pytest.approx(1.0642, abs=1e-4), pytest.approx(1.1)),
        "MH-MoE h 2 static": ("MH-MoE static", pytest.approx(1.3186, abs=1e-4), pytest.approx(2.5)),
        "SMoE static": ("SMoE static", pytest.approx(1.0550, abs=1e-4), pytest.approx(1.5)),
    }
