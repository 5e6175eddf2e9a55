import sys

import pytest
import torch
from typer import BadParameter

from mhmoe_ray.bench.peers import PEERS
from mhmoe_ray.cli.bench_layer import layer
from mhmoe_ray.errors import DataError, SpecError
from tests.cli.run import assert_one_line, mhmoe, mhmoe_subprocess

SMALL = ("--tokens", "16", "--d-model", "48", "--experts", "4", "--d-expert", "96", "--rounds", "2")


def test_bench_layer_shows_ratios_their_rounds_and_memory(tmp_path):
    result = mhmoe_subprocess(
        tmp_path, "bench", "layer", *SMALL, "--heads", "3", "--static", "--peers", "--json", OMP_NUM_THREADS="1"
    )
    figures = result.json()
    rows = {row["layer"]: row for row in figures["layers"]}
    our_layers = ["dense", "SMoE", "X-MoE", "MH-MoE h 3", "fine-grained", "SMoE static", "MH-MoE h 3 static"]
    assert list(rows)[:7] == our_layers
    assert rows["dense"]["to_dense"] == rows["SMoE"]["to_smoe"] == 1
    assert all(len(row["seconds"]) == 2 for row in rows.values())
    assert all(0 < row["kept_for_backward"] < row["peak"] for row in rows.values())
    assert (figures["device"], figures["dtype"], figures["rounds"]) == ("cpu", "bfloat16", 2)
    # Each peer is either measured, or the report has the reason why it is not.
    skip_reasons = {row["name"]: row["why"] for row in figures["not_measured"]}
    assert {*rows, *skip_reasons} == {*our_layers, *(peer.name for peer in PEERS)}
    assert all(rows[name]["package"] for name in rows if name not in our_layers)
    assert [row["layer"] for row in figures["paper"]] == ["SMoE", "MH-MoE h 3", "SMoE static", "MH-MoE h 3 static"]
    # The tables are printed to stderr in addition to the JSON, because the measurements may have taken minutes.
    for part in ("peak memory", "the paper's model", "33.98", *(f"not measured: {name}: " for name in skip_reasons)):
        assert part in result.err


@pytest.mark.long
def test_bench_count_has_the_work_of_each_part(tmp_path):
    small = ("--set", "size=tiny", "--set", "train.compile=false", "--set", "train.precision=bfloat16")
    result = mhmoe_subprocess(tmp_path, "bench", "count", "--preset", "mhmoe", *small, "--json")
    parts = result.json()["parts"]
    assert parts.keys() >= {"embedding", "blocks: attention", "blocks: experts", "output and loss", "update"}
    assert all(work["kernels"] >= 1 and work["bytes"] > 0 and work["seconds"] > 0 for work in parts.values())
    assert "counted for an H100" in result.err


@pytest.mark.long
def test_bench_layer_over_an_axis_gives_tables_and_a_plot(tmp_path, capsys):
    png = tmp_path / "a.png"
    threads = torch.get_num_threads()
    # With more threads, the threads of such small layers would mostly wait for each other.
    torch.set_num_threads(1)
    layer(d_model=48, experts=4, d_expert=96, axis="tokens", points="16,32", rounds=1, png=png)
    torch.set_num_threads(threads)
    output = capsys.readouterr()
    for part in ("median time over tokens", "time ~ tokens^", "peak memory over tokens", "MH-MoE h 4"):
        assert part in output.out
    assert f"wrote {png}" in output.err
    assert png.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_refused_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match=r"matplotlib is missing; pip install 'mhmoe-ray\[plots\]'"):
        layer(axis="tokens", png=tmp_path / "a.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": "16"}, "there is no axis for them; give --over"),
        ({"axis": "tokens", "points": "16,many"}, "not whole numbers"),
        ({"axis": "tokens", "points": "0"}, "at least 1"),
        ({"axis": "heads", "heads": [2]}, "would be ignored"),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(BadParameter, match=message):
        layer(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "there are only 8 experts"),
        ({"axis": "top-k", "points": "1,9", "tokens": 4, "d_model": 16, "rounds": 1}, "there are only 8 experts"),
        ({"heads": [5], "d_model": 48}, "a width of 48 does not split"),
        ({"kernels": "cpp", "dtype": "float32", "tokens": 16}, "kernel cpp computes in bfloat16, not in float32"),
    ],
)
@pytest.mark.cpu
def test_impossible_layers_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        layer(**options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("engines", "--rate", "2"), "no clients that come at random"),
        (("heads", "--peers"), "would ignore --peers"),
        (("heads", "--prompt", "64"), "would ignore --peers, --equal and --prompt"),
        (("engines", "--prompt", "900"), "1,687 tokens at most, but models have 1,024 positions"),
        (("engines", "--prompt", "1000", "--equal"), "1,064 tokens at most"),
    ],
)
def test_contradicting_options_are_usage_errors(tmp_path, words, message):
    result = mhmoe(tmp_path, "bench", "serve", *words)
    assert result.code == 2
    assert message in " ".join(result.err.split())


def test_impossible_width_of_a_served_model_is_one_line(tmp_path):
    result = mhmoe(tmp_path, "bench", "serve", "engines", "--d-model", "65")
    assert_one_line(result, 3, "bench serve: d_model 65 must be a multiple of twice")


def test_plot_needs_an_axis_and_a_writable_file(tmp_path):
    with pytest.raises(BadParameter, match="give --over"):
        layer(png=tmp_path / "a.png")
    with pytest.raises(DataError, match=r"image .*a\.png: No such file or directory"):
        layer(axis="tokens", png=tmp_path / "no" / "a.png")
    with pytest.raises(DataError, match="Is a directory"):
        layer(axis="tokens", png=tmp_path)


def test_bench_train_shows_steps_of_matched_models(tmp_path):
    sizes = ("--d-model", "48", "--layers", "2", "--seq-len", "8", "--micro-batch-size", "2", "--rounds", "2")
    result = mhmoe_subprocess(tmp_path, "bench", "train", *sizes, "--heads", "3", "--json", OMP_NUM_THREADS="1")
    figures = result.json()
    assert [row["model"] for row in figures["models"]] == ["SMoE", "MH-MoE h 3"]
    assert all(len(row["seconds"]) == 2 for row in figures["models"])
    assert "the paper's" in result.err
