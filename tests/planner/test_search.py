"""Tests of the search for settings: it is compared with an evaluation of each valid setting by itself."""

import itertools

import pytest

import mhmoe_ray as mh
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner import search
from mhmoe_ray.planner.adapt import valid_changes
from mhmoe_ray.planner.estimate import estimate_step_time
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.placement import build_layout, hypothetical_nodes, pack_workers
from mhmoe_ray.planner.search import MEMORY_SHARE, on_paper, search_settings
from tests.cli.run import assert_one_line, mhmoe
from tests.support.specs import TINY, tiny_spec

PRESET = "name: a\npreset: mhmoe\nsize: base\ndata: {sources: {web: {path: raw}}, prepared: prepared}\n"
VALUES = {
    "train.recompute": ("none", "exchange", "block"),
    "train.loss_chunk_rows": (2048, 128),
    "train.moment_precision": ("float32", "bfloat16"),
    "train.residual_precision": ("float32",),
}


def seconds_of(estimate):
    return (estimate.sequential_seconds + estimate.overlapped_seconds) / 2


def fitting_seconds(spec, nodes, gpus):
    """Return the estimated seconds of all valid settings that fit, each computed by itself."""
    workers, samples = nodes * gpus, spec.train.micro_batches * spec.train.micro_batch_size
    sizes = [size for size in range(1, workers + 1) if workers % size == 0]
    values = {
        "cluster.workers": [workers],
        "cluster.gpus_per_worker": [1],
        "cluster.ep": sizes,
        "cluster.strategy": ["ddp", "fsdp"],
        "cluster.shard_experts": [False, True],
        "cluster.shard_group": [None, *sizes],
        "cluster.reduce_after": ["step", "micro_batch"],
        "cluster.gather_precision": ["float32", "bfloat16"],
        **VALUES,
    }
    splits = [(n, samples // n) for n in range(workers, samples + 1, workers) if samples % n == 0]
    changes = (
        {**dict(zip(values, choice, strict=True)), "train.micro_batches": count, "train.micro_batch_size": size}
        for *choice, (count, size) in itertools.product(*values.values(), splits)
    )
    limit = MEMORY_SHARE * spec.cluster.accelerator.memory
    placed_nodes = pack_workers(hypothetical_nodes(nodes, gpus, gpus), 1, 1, workers)
    return [
        seconds_of(estimate_step_time(variant, build_layout(placed_nodes, variant.cluster.ep)))
        for _, variant in valid_changes(spec, changes)
        if compute_memory(variant).total <= limit
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    ("nodes", "gpus", "memory_share"),
    [
        (1, 2, 1.0),
        (1, 4, 0.5),
        (2, 2, 0.8),
        (1, 8, 0.8),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 8, 0.5), (4, 4, 1.0)]),
    ],
)
def test_search_equals_brute_force(monkeypatch, nodes, gpus, memory_share):
    train = {"precision": "bfloat16", "micro_batches": max(4, nodes * gpus), "micro_batch_size": 2}
    model = {"moe": TINY["model"]["moe"] | {"experts": max(4, nodes * gpus)}}
    memory = compute_memory(tiny_spec(model=model, train=train, cluster={"gpus_per_worker": 1})).total
    cluster = {"gpus_per_worker": 1, "accelerator": {"memory": memory_share * memory}}
    spec = tiny_spec(model=model, train=train, cluster=cluster)
    monkeypatch.setattr(search, "TRAIN_VALUES", VALUES)
    expected_seconds = sorted({f"{seconds:.6f}" for seconds in fitting_seconds(spec, nodes, gpus)})
    settings = search_settings(*on_paper(spec, nodes, gpus), 10)
    assert [f"{seconds_of(setting.estimate):.6f}" for setting in settings] == expected_seconds[:10]


@pytest.mark.parametrize(("name", "nodes", "gpus"), [("qwen3-30b", 1, 8), ("trillion", 128, 8)])
def test_sums_of_terms_are_memory_and_time_and_no_worse_than_the_file(name, nodes, gpus):
    spec = mh.load_spec(f"jobs/scale/{name}.yaml", ["cluster.gpus_per_worker=1"])
    planned, nodes_on_paper = on_paper(spec, nodes, gpus)
    limit = MEMORY_SHARE * spec.cluster.accelerator.memory
    settings = search_settings(planned, nodes_on_paper, 3)
    candidates = sorted(search.candidate_settings(planned, nodes_on_paper, limit), key=lambda c: c[:4])
    candidate_of_speed = {candidate.speed: candidate for candidate in reversed(candidates)}
    for setting, speed in zip(settings, sorted(candidate_of_speed), strict=False):
        assert candidate_of_speed[speed].memory == setting.memory
        assert float(speed) == pytest.approx(seconds_of(setting.estimate), abs=1e-6)
    step = mh.plan(spec, nodes, gpus)["estimate"]["step"]
    assert seconds_of(settings[0].estimate) <= (step["seconds_in_turn"] + step["seconds_overlapped"]) / 2


def test_command_lists_settings_and_writes_the_first(tmp_path):
    (tmp_path / "spec.yaml").write_text(PRESET)
    words = ("plan", "spec.yaml", "--nodes", "1", "--gpus", "8", "--search")
    plans = mhmoe(tmp_path, *words, "--json", "--write", "best.yaml").json()
    times = [setting["estimate"]["step"]["seconds_in_turn"] for setting in plans]
    assert len(plans) == 10
    best = mh.load_spec(tmp_path / "best.yaml")
    assert mh.plan(best, 1, 8)["estimate"]["step"]["seconds_in_turn"] == pytest.approx(times[0])
    assert mh.search_plans(best, 1, 8, count=1)[0]["keys"] == plans[0]["keys"]
    assert mhmoe(tmp_path, *words).out.count("train.recompute=") < 10
    assert_one_line(mhmoe(tmp_path, *words, "--write", "best.yaml"), 3, "best.yaml: it exists")


def test_cluster_without_a_fit_says_what_would_fit():
    spec = mh.load_spec("jobs/scale/qwen3-30b.yaml", ["cluster.gpus_per_worker=1"])
    with pytest.raises(SpecError, match=r"no setting fits in 90% .* of 2 GPUs; plan for 8 GPUs, on which it fits"):
        mh.search_plans(spec, 1, 2)
