"""Tests of the tables and the JSON of `mhmoe plan` and `mhmoe presets`."""

import math
import re
from pathlib import Path

import pytest

from mhmoe_ray.planner.resolve import all_presets
from tests.cli.run import mhmoe

JOBS = Path(__file__).parents[2] / "jobs"
# Files with `sizes` are sweeps. A spec with `start` can be planned only where the run exists from which it starts.
SPECS = sorted(path for path in JOBS.rglob("*.yaml") if not re.search(r"^(sizes|start):", path.read_text(), re.M))


def test_plan_shows_sizes_and_layout(corpus):
    plan = mhmoe(corpus, "plan", "spec.yaml", "--set", "cluster.workers=4", "--json").json()
    assert plan["layout"]["expert_groups"] == [[0, 1], [2, 3]]
    assert plan["layout"]["experts_per_rank"] == 2
    assert plan["tokens_per_step"] == 4 * 2 * 16
    assert plan["spec"]["train"]["steps"] == 30
    text = mhmoe(corpus, "plan", "spec.yaml").out
    for part in (f"{plan['sizes']['parameters']:,}", "2 = dp 1 x ep 2", "multi-head, 2 heads;"):
        assert part in text
    text = mhmoe(corpus, "plan", "spec.yaml", "--set", "model.moe.d_sub_token=24").out
    assert "multi-head, 2 heads, sub-tokens of width 24;" in " ".join(text.split())


def test_plan_shows_ratios_memory_and_traffic(corpus):
    overrides = ("--set", "reference=smoe", "--set", "cluster.workers=4", "--set", "train.precision=bfloat16")
    plan = mhmoe(corpus, "plan", "spec.yaml", *overrides, "--json").json()
    text = mhmoe(corpus, "plan", "spec.yaml", *overrides).out
    assert sum(p["layers"] * p["parameters"] for p in plan["parts"]) == plan["sizes"]["parameters"]
    assert sum(p["layers"] * p["macs"] for p in plan["parts"]) == plan["sizes"]["macs_per_token"]
    ratio = plan["parity"]["parameters"]
    assert ratio["ratio"] == ratio["own"] / ratio["reference"]
    assert f"{ratio['own']:,}" in text
    assert f"{ratio['ratio']:.3f}" in text
    rank_memory = plan["memory_per_rank"]
    assert rank_memory["total"] == sum(size for name, size in rank_memory.items() if name != "total")
    assert rank_memory["copies"] > 0
    assert [e["times"] for e in plan["exchanges"]] == [1, 1, 1, 1, 1, 1, 1]
    for words in ("beside smoe", "memory of a rank", "expert step", "rows to experts", "gradients of experts"):
        assert words in text
    step = plan["expert_step"]
    assert step["intensity"] == step["flops"] / step["bytes"]


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (10, "0.003 from step 10 on, down to 0.0003"),
        (60, "0.0015 at most, not 0.003: all 30 steps are part of a warm-up of 60"),
    ],
)
def test_plan_shows_the_peak_learning_rate(corpus, warmup, expected):
    rates = ("--set", "train.lr=0.003", "--set", "train.min_lr=0.0003", "--set", f"train.warmup_steps={warmup}")
    assert expected in " ".join(mhmoe(corpus, "plan", "spec.yaml", *rates).out.split())


def test_plan_shows_memory_with_the_fewest_workers_too(corpus):
    """A rank needs most memory with the fewest workers, since its shards are largest then."""
    range_ = ("--set", "cluster.workers={min: 2, max: 4}", "--set", "cluster.strategy=zero1")
    plan = mhmoe(corpus, "plan", "spec.yaml", *range_, "--json").json()
    max_workers_memory, min_workers_memory = plan["memory_per_rank"], plan["memory_per_rank_of_fewest"]
    assert min_workers_memory["moments"] == 2 * max_workers_memory["moments"]
    lines = mhmoe(corpus, "plan", "spec.yaml", *range_).out.splitlines()
    assert "of 4 workers  of 2 workers" in " ".join(lines)
    moments = next(line for line in lines if line.startswith("moments")).split()
    assert moments[1] != moments[3]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (["checkpoint_every=10"], "3, one every 10 steps, "),
        (["checkpoint_every=30"], "checkpoints 1, at the end, "),
        (["checkpoint_every=100", "keep_checkpoints=1"], "checkpoints 1, at the end, "),
        (["checkpoint_every=20"], "2, one every 20 steps and one at the end, "),
        (["checkpoint_every=7", "keep_checkpoints=3"], "5, one every 7 steps and one at the end, of which the newest 3 "
         "and the best stay, "),
    ],
)  # fmt: skip
def test_plan_counts_the_checkpoint_of_the_last_step(corpus, train, expected):
    words = [word for key in train for word in ("--set", f"train.{key}")]
    assert expected in " ".join(mhmoe(corpus, "plan", "spec.yaml", *words).out.split())


def test_plan_shows_the_kernel_assumed_for_auto(corpus):
    bfloat16, gpus = ("--set", "train.precision=bfloat16"), ("--set", "cluster.gpus_per_worker=1")
    for overrides, kernel, expected in [
        ((), "grouped", "auto, taken to be grouped"),
        (bfloat16, "grouped", "auto, taken to be grouped; where CPUs have AMX it is cpp, which keeps less"),
        ((*bfloat16, *gpus), "grouped_mm", "auto, taken to be grouped_mm"),
    ]:
        assert mhmoe(corpus, "plan", "spec.yaml", *overrides, "--json").json()["kernel"] == kernel
        lines = mhmoe(corpus, "plan", "spec.yaml", *overrides, COLUMNS="200").out.splitlines()
        assert next(line for line in lines if line.startswith("kernel")).split(maxsplit=1)[1].strip() == expected
    output = mhmoe(corpus, "plan", "spec.yaml", "--set", "model.moe.kernel=reference").out
    assert "\nkernel" not in output


def test_plan_counts_the_checkpoint_copy_on_a_cpu_worker_or_the_host(corpus):
    """The copy counts in the memory of a CPU worker; for a GPU worker it counts on the host."""

    def memory_lines(*overrides):
        text = mhmoe(corpus, "plan", "spec.yaml", *overrides).out
        return [line.rstrip() for line in text.splitlines() if line.startswith(("checkpoint copy", "total"))]

    gpus = ("--set", "cluster.gpus_per_worker=1")
    plan, gpu_plan = (mhmoe(corpus, "plan", "spec.yaml", *overrides, "--json").json() for overrides in ((), gpus))
    share = 12 * plan["sizes"]["parameters"] // plan["layout"]["workers"]
    assert plan["memory_per_rank"]["checkpoint_copy"] == gpu_plan["pinned_host_memory_per_rank"] == share
    assert plan["pinned_host_memory_per_rank"] == gpu_plan["memory_per_rank"]["checkpoint_copy"] == 0
    assert [line.split("  ")[0] for line in memory_lines()] == ["checkpoint copy", "total"]
    assert [line.split("  ")[0] for line in memory_lines(*gpus)] == ["total", "checkpoint copy, on the host"]


def test_plan_shows_the_drops_of_random_static_routing(corpus):
    static = ("--set", "model.moe.capacity_factor=0.5")
    plan = mhmoe(corpus, "plan", "spec.yaml", *static, "--json").json()
    moe = plan["spec"]["model"]["moe"]
    rows = plan["spec"]["train"]["micro_batch_size"] * plan["spec"]["data"]["seq_len"] * moe["heads"]
    expert_capacity = math.ceil(0.5 * moe["top_k"] * math.ceil(rows / moe["experts"]))
    assert plan["dropped_by_chance"] >= 1 - expert_capacity * moe["experts"] / (rows * moe["top_k"]) > 0.4
    expected = (
        f"expert capacity is {expert_capacity:,} for the {rows:,} rows of a micro-batch; even and random routing "
        "would drop "
    )
    expected += f"{plan['dropped_by_chance']:.1%} of the routes"
    assert expected in " ".join(mhmoe(corpus, "plan", "spec.yaml", *static).out.split())
    random_second_expert = (*static, "--set", "model.moe.second_expert=random")
    upper_bound = expected.replace("drop ", "drop at most ")
    assert upper_bound in " ".join(mhmoe(corpus, "plan", "spec.yaml", *random_second_expert).out.split())
    assert mhmoe(corpus, "plan", "spec.yaml", "--json").json()["dropped_by_chance"] == 0
    assert "static routing" not in mhmoe(corpus, "plan", "spec.yaml").out


def test_plan_shows_the_matching_experts_that_ep_prevents(tmp_path):
    spec = "name: a\npreset: mhmoe\nsize: base\ndata: {sources: {web: {path: raw}}, prepared: prepared}\n"
    (tmp_path / "a.yaml").write_text(f"{spec}cluster: {{ep: 9, workers: 9}}\ntrain: {{micro_batches: 9}}\n")
    text = " ".join(mhmoe(tmp_path, "plan", "a.yaml").out.split())
    assert "have 45 experts of width 768" in text
    assert "(smoe); 41 experts would match it, but cluster.ep 9 does not divide them" in text
    overrides = ("--set", "cluster.ep=4", "--set", "cluster.workers=4", "--set", "train.micro_batches=4")
    assert "experts would match" not in mhmoe(tmp_path, "plan", "a.yaml", *overrides).out


@pytest.mark.parametrize("spec", SPECS, ids=[str(p.relative_to(JOBS)) for p in SPECS])
def test_every_spec_in_jobs_can_be_planned(tmp_path, spec):
    plan = mhmoe(tmp_path, "plan", str(spec), "--json").json()
    assert plan["sizes"]["parameters"] > 0
    assert plan["spec"]["name"] == spec.stem


def test_plan_of_a_sweep_is_one_line(tmp_path):
    result = mhmoe(tmp_path, "plan", str(JOBS / "paper" / "heads.yaml"))
    assert (result.code, result.err.count("\n")) == (3, 1)
    assert "its key `sizes` makes it a sweep, not the spec of one run; give it to `mhmoe sweep`" in result.err


def test_wide_numbers_are_not_truncated(tmp_path):
    """Rich takes a pipe for a terminal of 80 columns, and by default would truncate cells."""
    args = ("plan", str(JOBS / "paper" / "p1.yaml"), "--set", "preset=p1-mhmoe-256-h4")
    text, parameters = mhmoe(tmp_path, *args).out, mhmoe(tmp_path, *args, "--json").json()["sizes"]["parameters"]
    assert "…" not in text
    assert text.count(f"{parameters:,}") == 2


def test_presets_lists_all_presets_with_both_ratios(tmp_path):
    rows = mhmoe(tmp_path, "presets", "--json").json()
    assert [(r["preset"], r["size"]) for r in rows] == [(name, size) for name, size, _ in all_presets()]
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
    result = mhmoe(tmp_path, "presets", "nothing")
    assert (result.code, result.err) == (
        3,
        "error: preset nothing: no preset has this in its name; see all of them with `mhmoe presets`\n",
    )


def test_readme_shows_the_current_table(tmp_path):
    readme = (JOBS.parent / "mhmoe_ray/planner/README.md").read_text()
    start = readme.index("    beside p2-smoe on the same trunk")
    block = [line.removeprefix("    ").rstrip() for line in readme[start:].split("\n\n")[0].splitlines()]
    text = mhmoe(tmp_path, "plan", str(JOBS / "paper" / "p2.yaml")).out
    assert "\n".join(block) in "\n".join(line.rstrip() for line in text.splitlines())
