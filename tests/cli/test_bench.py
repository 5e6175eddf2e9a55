import sys

import pytest
import torch
from typer import BadParameter

from mhmoe_ray.bench.peers import PEERS
from mhmoe_ray.cli.bench_layer import layer
from mhmoe_ray.errors import DataError, SpecError
from tests.cli.run import assert_one_line, mhmoe_anew

SMALL = ("--tokens", "16", "--d-model", "48", "--experts", "4", "--d-expert", "96", "--rounds", "2")


def test_bench_layer_shows_ratios_their_rounds_and_memory(tmp_path):
    shown = mhmoe_anew(
        tmp_path, "bench", "layer", *SMALL, "--heads", "3", "--static", "--peers", "--json", OMP_NUM_THREADS="1"
    )
    found = shown.json()
    rows = {row["layer"]: row for row in found["layers"]}
    ours = ["dense", "SMoE", "X-MoE", "MH-MoE h 3", "fine-grained", "SMoE static", "MH-MoE h 3 static"]
    assert list(rows)[:7] == ours
    assert rows["dense"]["to_dense"] == rows["SMoE"]["to_smoe"] == 1
    assert all(len(row["seconds"]) == 2 for row in rows.values())
    assert all(0 < row["kept_for_backward"] < row["peak"] for row in rows.values())
    assert (found["device"], found["dtype"], found["rounds"]) == ("cpu", "bfloat16", 2)
    # Every peer is measured or says why not.
    missing = {row["name"]: row["why"] for row in found["not_measured"]}
    assert {*rows, *missing} == {*ours, *(peer.name for peer in PEERS)}
    assert all(rows[name]["package"] for name in rows if name not in ours)
    assert [row["layer"] for row in found["paper"]] == ["SMoE", "MH-MoE h 3", "SMoE static", "MH-MoE h 3 static"]
    # What it took minutes to measure is shown as well.
    for part in ("peak memory", "the paper's model", "33.98", *(f"not measured: {name}: " for name in missing)):
        assert part in shown.err


def test_bench_layer_over_an_axis_gives_tables_and_a_plot(tmp_path, capsys):
    png = tmp_path / "a.png"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small layers would mostly wait for others
    layer(d_model=48, experts=4, d_expert=96, over="tokens", points="16,32", rounds=1, png=png)
    torch.set_num_threads(threads)
    shown = capsys.readouterr()
    for part in ("median time over tokens", "time ~ tokens^", "peak memory over tokens", "MH-MoE h 4"):
        assert part in shown.out
    assert f"wrote {png}" in shown.err
    assert png.read_bytes().startswith(b"\x89PNG")


def test_sizes_that_do_not_fit_are_one_line(tmp_path):
    assert_one_line(mhmoe_anew(tmp_path, "bench", "layer", *SMALL, "--heads", "5"), 3, "does not split")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match=r"matplotlib is missing; pip install 'mhmoe-ray\[plots\]'"):
        layer(over="tokens", png=tmp_path / "a.png")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"points": "16"}, "give --over"),
        ({"over": "tokens", "points": "16,many"}, "not whole numbers"),
        ({"over": "tokens", "points": "0"}, "at least 1"),
        ({"over": "heads", "heads": [2]}, "would be ignored"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, why):
    with pytest.raises(BadParameter, match=why):
        layer(**options)


@pytest.mark.parametrize(
    "options", [{"top_k": 9}, {"over": "top-k", "points": "1,9", "tokens": 4, "d_model": 16, "rounds": 1}]
)
def test_sizes_of_a_layer_that_there_is_not_are_refused(options):
    with pytest.raises(SpecError, match="there are only 8 experts"):
        layer(**options)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("layer", "--points", "4"), "there is no axis"),
        (("serve", "engines", "--rate", "2"), "no clients that come at random"),
        (("serve", "heads", "--peers"), "would ignore --peers"),
        (("serve", "heads", "--prompt", "64"), "would ignore --peers, --equal and --prompt"),
        (("serve", "engines", "--prompt", "900"), "1,687 tokens at most, but models have 1,024 positions"),
        (("serve", "engines", "--prompt", "1000", "--equal"), "1,064 tokens at most"),
    ],
)
def test_they_are_mistakes_of_the_command_line(tmp_path, words, why):
    refused = mhmoe_anew(tmp_path, "bench", *words)
    assert refused.code == 2
    assert why in " ".join(refused.err.split())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("checkpoint", "--d-model", "130"), "bench checkpoint: d_model 130 must be a multiple of twice"),
        (("serve", "engines", "--d-model", "65"), "bench serve: d_model 65 must be a multiple of twice"),
        (
            ("layer", *SMALL, "--kernels", "cpp", "--dtype", "float32"),
            "kernel cpp computes in bfloat16, not in float32",
        ),
    ],
)
@pytest.mark.cpu
def test_sizes_and_kernels_that_there_are_not_are_one_line(tmp_path, words, why):
    assert_one_line(mhmoe_anew(tmp_path, "bench", *words), 3, why)


def test_a_plot_needs_an_axis_and_a_file_that_can_be_written(tmp_path):
    with pytest.raises(BadParameter, match="give --over"):
        layer(png=tmp_path / "a.png")
    with pytest.raises(DataError, match=r"picture .*a\.png: No such file or directory"):
        layer(over="tokens", png=tmp_path / "no" / "a.png")
    with pytest.raises(DataError, match="Is a directory"):
        layer(over="tokens", png=tmp_path)


def test_bench_train_shows_steps_of_matched_models(tmp_path):
    sizes = ("--d-model", "48", "--layers", "2", "--seq-len", "8", "--micro-batch-size", "2", "--rounds", "2")
    shown = mhmoe_anew(tmp_path, "bench", "train", *sizes, "--heads", "3", "--json", OMP_NUM_THREADS="1")
    found = shown.json()
    assert [row["model"] for row in found["models"]] == ["SMoE", "MH-MoE h 3"]
    assert all(len(row["seconds"]) == 2 for row in found["models"])
    assert "the paper's" in shown.err
    assert_one_line(mhmoe_anew(tmp_path, "bench", "train", *sizes, "--heads", "5"), 3, "48 does not split")


def test_bench_commands_times_help_and_the_status_of_a_long_run(corpus):
    found = mhmoe_anew(
        corpus, "bench", "commands", "spec.yaml", "--no-submit", "--lines", "3000", "--rounds", "1", "--json"
    ).json()
    assert found["lines"] == 3000
    assert len(found["help"]) == len(found["status"]) == 1
    assert min(*found["help"], *found["status"]) > 0
    assert found["submit"] == []
