"""`mhmoe plan` and `mhmoe presets`: the tables and their JSON."""

import math
from pathlib import Path

import pytest

from mhmoe_ray.planner.resolve import every_preset
from tests.cli.run import mhmoe

JOBS = Path(__file__).parents[2] / "jobs"
SPECS = sorted(path for path in JOBS.rglob("*.yaml") if "\nsizes:" not in path.read_text())


def test_plan_shows_sizes_and_layout(corpus):
    plan = mhmoe(corpus, "plan", "spec.yaml", "--set", "cluster.workers=4", "--json").json()
    assert plan["layout"]["expert_groups"] == [[0, 1], [2, 3]]
    assert plan["layout"]["experts_per_rank"] == 2
    assert plan["tokens_per_step"] == 4 * 2 * 16
    assert plan["spec"]["train"]["steps"] == 30
    text = mhmoe(corpus, "plan", "spec.yaml").out
    for part in (f"{plan['sizes']['parameters']:,}", "2 = dp 1 x ep 2", "multi-head, 2 heads"):
        assert part in text


def test_plan_shows_ratios_memory_and_traffic(corpus):
    more = ("--set", "reference=smoe", "--set", "cluster.workers=4", "--set", "train.precision=bfloat16")
    plan = mhmoe(corpus, "plan", "spec.yaml", *more, "--json").json()
    text = mhmoe(corpus, "plan", "spec.yaml", *more).out
    assert sum(p["layers"] * p["parameters"] for p in plan["parts"]) == plan["sizes"]["parameters"]
    assert sum(p["layers"] * p["macs"] for p in plan["parts"]) == plan["sizes"]["macs_per_token"]
    ratio = plan["parity"]["parameters"]
    assert ratio["ratio"] == ratio["own"] / ratio["reference"]
    assert f"{ratio['own']:,}" in text
    assert f"{ratio['ratio']:.3f}" in text
    held = plan["memory_per_rank"]
    assert held["total"] == sum(size for name, size in held.items() if name != "total")
    assert held["copies"] > 0
    assert [e["times"] for e in plan["exchanges"]] == [1, 1, 1, 1, 1, 1, 1]
    for words in ("beside smoe", "memory of a rank", "expert step", "rows to experts", "gradients of experts"):
        assert words in text
    step = plan["expert_step"]
    assert step["intensity"] == step["flops"] / step["bytes"]


@pytest.mark.parametrize(
    ("warmup", "told"),
    [
        (10, "0.003 from step 10 on, down to 0.0003"),
        (60, "0.0015 at most, not 0.003: all 30 steps are of a warm-up of 60"),
    ],
)
def test_plan_says_which_learning_rate_is_reached(corpus, warmup, told):
    rates = ("--set", "train.lr=0.003", "--set", "train.min_lr=0.0003", "--set", f"train.warmup_steps={warmup}")
    assert told in " ".join(mhmoe(corpus, "plan", "spec.yaml", *rates).out.split())


def test_plan_shows_memory_at_the_fewest_workers_too(corpus):
    """The slices of a worker are largest there."""
    range_ = ("--set", "cluster.workers={min: 2, max: 4}", "--set", "cluster.strategy=zero1")
    plan = mhmoe(corpus, "plan", "spec.yaml", *range_, "--json").json()
    most, fewest = plan["memory_per_rank"], plan["memory_per_rank_of_fewest"]
    assert fewest["moments"] == 2 * most["moments"]
    lines = mhmoe(corpus, "plan", "spec.yaml", *range_).out.splitlines()
    assert "of 4 workers  of 2 workers" in " ".join(lines)
    moments = next(line for line in lines if line.startswith("moments")).split()
    assert moments[1] != moments[3]


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (["checkpoint_every=10"], "3, one every 10 steps, "),
        (["checkpoint_every=30"], "checkpoints 1, at the end, "),
        (["checkpoint_every=100", "keep_checkpoints=1"], "checkpoints 1, at the end, "),
        (["checkpoint_every=20"], "2, one every 20 steps and one at the end, "),
        (["checkpoint_every=7", "keep_checkpoints=3"], "5, one every 7 steps and one at the end, of which the newest 3 "
         "and the best stay, "),
    ],
)  # fmt: skip
def test_plan_counts_the_checkpoint_of_the_last_step(corpus, train, told):
    words = [word for key in train for word in ("--set", f"train.{key}")]
    assert told in " ".join(mhmoe(corpus, "plan", "spec.yaml", *words).out.split())


def test_plan_says_what_kernel_auto_is_taken_for(corpus):
    half, gpus = ("--set", "train.precision=bfloat16"), ("--set", "cluster.gpus_per_worker=1")
    for more, kernel, told in [
        ((), "grouped", "auto, taken to be grouped"),
        (half, "grouped", "auto, taken to be grouped; where CPUs have AMX it is cpp, which keeps less"),
        ((*half, *gpus), "triton", "auto, taken to be triton"),
    ]:
        assert mhmoe(corpus, "plan", "spec.yaml", *more, "--json").json()["kernel"] == kernel
        lines = mhmoe(corpus, "plan", "spec.yaml", *more, COLUMNS="200").out.splitlines()
        assert next(line for line in lines if line.startswith("kernel")).split(maxsplit=1)[1].strip() == told
    named = mhmoe(corpus, "plan", "spec.yaml", "--set", "model.moe.kernel=reference").out
    assert "\nkernel" not in named


def test_plan_counts_the_copy_of_a_checkpoint_where_it_is(corpus):
    """The copy counts in the memory of a CPU worker; for a GPU worker it counts on the host."""

    def shown(*more):
        text = mhmoe(corpus, "plan", "spec.yaml", *more).out
        return [line.rstrip() for line in text.splitlines() if line.startswith(("checkpoint copy", "total"))]

    gpus = ("--set", "cluster.gpus_per_worker=1")
    plan, beside = (mhmoe(corpus, "plan", "spec.yaml", *more, "--json").json() for more in ((), gpus))
    share = 12 * plan["sizes"]["parameters"] // plan["layout"]["workers"]
    assert plan["memory_per_rank"]["checkpoint_copy"] == beside["pinned_host_memory_per_rank"] == share
    assert plan["pinned_host_memory_per_rank"] == beside["memory_per_rank"]["checkpoint_copy"] == 0
    assert [line.split("  ")[0] for line in shown()] == ["checkpoint copy", "total"]
    assert [line.split("  ")[0] for line in shown(*gpus)] == ["total", "checkpoint copy, on the host"]


def test_plan_says_what_static_routing_drops_by_chance(corpus):
    static = ("--set", "model.moe.capacity_factor=0.5")
    plan = mhmoe(corpus, "plan", "spec.yaml", *static, "--json").json()
    moe = plan["spec"]["model"]["moe"]
    rows = plan["spec"]["train"]["micro_batch_size"] * plan["spec"]["data"]["seq_len"] * moe["heads"]
    places = math.ceil(0.5 * moe["top_k"] * math.ceil(rows / moe["experts"]))
    assert plan["dropped_by_chance"] >= 1 - places * moe["experts"] / (rows * moe["top_k"]) > 0.4
    told = (
        f"an expert has {places:,} places for the {rows:,} rows of a micro-batch; of choices made evenly and at random "
    )
    told += f"{plan['dropped_by_chance']:.1%} would be dropped"
    assert told in " ".join(mhmoe(corpus, "plan", "spec.yaml", *static).out.split())
    thinned = (*static, "--set", "model.moe.second_expert=random")
    most = told.replace("random ", "random at most ")
    assert most in " ".join(mhmoe(corpus, "plan", "spec.yaml", *thinned).out.split())
    assert mhmoe(corpus, "plan", "spec.yaml", "--json").json()["dropped_by_chance"] == 0
    assert "static routing" not in mhmoe(corpus, "plan", "spec.yaml").out


def test_plan_says_how_many_experts_ep_keeps_a_match_from(tmp_path):
    spec = "name: a\npreset: mhmoe\nsize: base\ndata: {sources: {web: {path: raw}}, prepared: prepared}\n"
    (tmp_path / "a.yaml").write_text(f"{spec}cluster: {{ep: 9, workers: 9}}\ntrain: {{micro_batches: 9}}\n")
    text = " ".join(mhmoe(tmp_path, "plan", "a.yaml").out.split())
    assert "have 45 experts of width 768" in text
    assert "(smoe); 41 experts would match it, but cluster.ep 9 does not divide them" in text
    four = ("--set", "cluster.ep=4", "--set", "cluster.workers=4", "--set", "train.micro_batches=4")
    assert "experts would match" not in mhmoe(tmp_path, "plan", "a.yaml", *four).out


@pytest.mark.parametrize("spec", SPECS, ids=[str(p.relative_to(JOBS)) for p in SPECS])
def test_every_spec_of_ours_can_be_planned(tmp_path, spec):
    plan = mhmoe(tmp_path, "plan", str(spec), "--json").json()
    assert plan["sizes"]["parameters"] > 0
    assert plan["spec"]["name"] == spec.stem


def test_a_sweep_is_no_spec(tmp_path):
    wrong = mhmoe(tmp_path, "plan", str(JOBS / "paper" / "heads.yaml"))
    assert (wrong.code, wrong.err.count("\n")) == (3, 1)
    assert "it is a sweep, not the spec of one run; give it to `mhmoe sweep`" in wrong.err


def test_a_wide_number_is_never_cut(tmp_path):
    """Output into a pipe counts as 80 columns wide."""
    args = ("plan", str(JOBS / "paper" / "p1.yaml"), "--set", "preset=p1-mhmoe-256-h4")
    text, parameters = mhmoe(tmp_path, *args).out, mhmoe(tmp_path, *args, "--json").json()["sizes"]["parameters"]
    assert "…" not in text
    assert text.count(f"{parameters:,}") == 2


def test_presets_lists_all_with_both_ratios(tmp_path):
    rows = mhmoe(tmp_path, "presets", "--json").json()
    assert [(r["preset"], r["size"]) for r in rows] == [(name, size) for name, size, _ in every_preset()]
    assert all(
        (r["parameters_ratio"] is None) == (r["reference"] is None) == (r["multiply_adds_ratio"] is None) for r in rows
    )
    for columns in ("80", "200"):
        header, *_ = mhmoe(tmp_path, "presets", COLUMNS=columns).out.splitlines()
        assert header.split()[-7:] == "h E k f parameters active multiply-adds".split()
    text = mhmoe(tmp_path, "presets", "p2").out
    line = next(line for line in text.splitlines() if line.startswith("p2-mhmoe-h3 "))
    assert line.split() == "p2-mhmoe-h3 p2-smoe: 1.023, 1.004 3 96 3 512 315 M 110 M 110 M".split()
    assert "…" not in text
    assert "P2, SMoE with a shared expert" in mhmoe(tmp_path, "presets", "p2-smoe-shared").out
    wrong = mhmoe(tmp_path, "presets", "nothing")
    assert (wrong.code, wrong.err) == (
        3,
        "error: preset nothing: no name has this in it; see them all with `mhmoe presets`\n",
    )


def test_readme_shows_the_table_of_today(tmp_path):
    readme = (JOBS.parent / "mhmoe_ray/planner/README.md").read_text()
    start = readme.index("    beside p2-smoe on the same trunk")
    block = [line.removeprefix("    ").rstrip() for line in readme[start:].split("\n\n")[0].splitlines()]
    text = mhmoe(tmp_path, "plan", str(JOBS / "paper" / "p2.yaml")).out
    assert "\n".join(block) in "\n".join(line.rstrip() for line in text.splitlines())
