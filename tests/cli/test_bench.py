from tests.cli.run import assert_one_line, mhmoe

SMALL = ("--tokens", "16", "--d-model", "48", "--experts", "4", "--d-expert", "96", "--rounds", "2")


def test_bench_layer_shows_ratios_and_their_rounds(tmp_path):
    found = mhmoe(tmp_path, "bench", "layer", *SMALL, "--heads", "3", "--json").json()
    rows = {row["layer"]: row for row in found["layers"]}
    assert list(rows) == ["dense", "SMoE", "X-MoE", "MH-MoE h 3", "fine-grained"]
    assert rows["dense"]["to_dense"] == rows["SMoE"]["to_smoe"] == 1
    assert all(len(row["seconds"]) == 2 for row in rows.values())
    text = mhmoe(tmp_path, "bench", "layer", *SMALL, "--static").out
    assert "MH-MoE h 4" in text
    assert "SMoE static" in text


def test_sizes_that_do_not_fit_are_one_line(tmp_path):
    assert_one_line(mhmoe(tmp_path, "bench", "layer", *SMALL, "--top-k", "9"), 3, "there are only 4 experts")
    assert_one_line(mhmoe(tmp_path, "bench", "layer", *SMALL, "--heads", "5"), 3, "does not split")
