"""Tests of the keys that `mhmoe plan` chooses for GPUs on paper."""

import re
from pathlib import Path

import pytest
import yaml

from mhmoe_ray.api.spec import load_spec
from mhmoe_ray.errors import MhmoeError, SpecError
from mhmoe_ray.planner.adapt import changed_keys, with_keys
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.placement import Node
from mhmoe_ray.planner.remedies import residual_advice
from mhmoe_ray.planner.search import MEMORY_SHARE, choose_on_paper, choose_settings, keep_choice
from mhmoe_ray.spec import RunSpec, validate_section
from tests.support.specs import tiny_spec

JOBS = sorted(Path("jobs").glob("**/*.yaml"))


def meaning(spec: RunSpec) -> dict[str, object]:
    """Return the keys of a spec that decide about losses, with the samples of a step in place of its micro-batches."""
    tree = spec.model_dump(mode="json", exclude={"cluster"})
    for key in ("recompute", "loss_chunk_rows", "compile"):
        tree["train"].pop(key)
    samples = spec.samples_per_step, [part.samples * spec.train.micro_batches for part in spec.parts]
    for section in (tree["train"], *tree["data"]["parts"].values()):
        section.pop("micro_batches", None)
        section.pop("micro_batch_size")
    return {**tree, "samples": samples}


@pytest.mark.parametrize("file", JOBS, ids=str)
def test_each_job_has_a_plan_for_eight_gpus_or_a_line_that_names_key_and_value(file):
    content = yaml.safe_load(file.read_text())
    error_text = None
    try:
        # The command loads a spec with the defaults of GPUs.
        spec = load_spec(file, ["cluster.gpus_per_worker=1"])
        adapted, chosen_keys = choose_on_paper(spec, 1, 8)
    except MhmoeError as e:
        error_text = str(e)
    if error_text is None:
        assert meaning(adapted) == meaning(spec)
        assert adapted.cluster.workers.max == chosen_keys["cluster.workers"] == 8
        assert adapted.train.micro_batches % 8 == 0
        given_keys = {f"{name}.{key}" for name in ("cluster", "train") for key in content.get(name) or {}}
        adapted_keys = {"cluster.workers", "cluster.gpus_per_worker", "train.micro_batches", "train.micro_batch_size"}
        assert not (given_keys - adapted_keys) & chosen_keys.keys()
        assert load_spec(file, chosen_keys) == adapted
    elif "sizes" in content:
        assert "its key `sizes` makes it a sweep" in error_text
    else:
        key, value = re.search(r"(\w+\.\w+):? ([\w-]+)", error_text).groups()
        section, name = key.split(".")
        assert str(content[section][name]) == value
        assert "\n" not in error_text


def memory(spec):
    return compute_memory(spec).total


def load_small(*overrides):
    tree = {"name": "small", "data": {"sources": {"web": {"path": "raw"}}, "prepared": "prepared"}}
    return load_spec({**tree, "preset": "mhmoe"}, overrides)


def gpu_keys(spec):
    return spec.train.compile, spec.train.loss_chunk_rows, spec.cluster.reduce_after


def test_defaults_are_those_of_the_hardware_unless_the_spec_sets_them():
    gpu = "cluster.gpus_per_worker=1"
    assert gpu_keys(load_small()) == (False, None, "step")
    assert gpu_keys(load_small(gpu)) == (True, 2048, "step")
    assert gpu_keys(load_small(gpu, "train.compile=false", "train.loss_chunk_rows=null")) == (False, None, "step")
    assert gpu_keys(load_small(gpu, "model.dropout=0.1"))[0] is False


def test_a_recorded_spec_keeps_the_values_of_its_run():
    recorded = load_small().model_dump(mode="json") | {"cluster": {"gpus_per_worker": 1}}
    assert gpu_keys(validate_section(RunSpec, recorded, "recorded")) == (False, None, "step")
    resolved = load_small("cluster.gpus_per_worker=1")
    assert validate_section(RunSpec, resolved.model_dump(mode="json"), "recorded") == resolved


def test_gradients_are_reduced_early_only_where_they_would_not_fit():
    keys = ["cluster.gpus_per_worker=1", "cluster.strategy=fsdp", "cluster.workers=2", "train.micro_batch_size=1"]
    keys += ["train.micro_batches=16", "cluster.shard_experts=true", "cluster.ep=1", "train.recompute=block"]
    roomy = load_small(*keys, "train.loss_chunk_rows=128")
    assert roomy.cluster.reduce_after == "step"
    keys += [f"cluster.accelerator.memory={(memory(roomy) - 1) / MEMORY_SHARE}", "train.loss_chunk_rows=128"]
    small = load_small(*keys)
    assert small.cluster.reduce_after == "micro_batch"
    assert memory(small) < memory(roomy)
    assert load_small(*keys, "cluster.reduce_after=step").cluster.reduce_after == "step"


def test_a_narrow_residual_stream_is_recommended_on_gpus_that_compute_in_bfloat16():
    keys = ["cluster.gpus_per_worker=1", "train.precision=bfloat16"]
    spec = load_small(*keys)
    # Two additions in each of four blocks read and write two bytes less of each value, and so do their gradients.
    saved_bytes = spec.tokens_per_step * 128 * 2 * 4 * 4 * 2
    assert f"about {saved_bytes / 1e9:.1f} GB that a rank moves" in residual_advice(spec)
    assert residual_advice(load_small(*keys, "train.residual_precision=bfloat16")) is None
    assert residual_advice(load_small("train.precision=bfloat16")) is None
    assert residual_advice(load_small(keys[0])) is None


def open_spec(batches=1, **cluster):
    """Return a spec with large experts that sets no key to choose, on GPUs with 150 MB of memory."""
    moe = {"heads": 1, "experts": 8, "top_k": 1, "d_expert": 2048, "every": 1}
    model = {"vocab_size": 300, "d_model": 256, "layers": 2, "attention_heads": 2, "d_ff": None, "moe": moe}
    cluster = {"accelerator": {"memory": 150e6}, "gpus_per_worker": 1, **cluster}
    train = {"micro_batches": batches, "micro_batch_size": 16 // batches}
    return tiny_spec(model=model, train=train, cluster=cluster)


def test_keys_change_only_if_memory_does_not_suffice():
    spec = open_spec()
    adapted, chosen_keys = choose_on_paper(spec, 1, 4)
    assert memory(adapted) <= MEMORY_SHARE * 150e6 < memory(with_keys(adapted, {"cluster.ep": 1}))
    assert meaning(adapted) == meaning(spec)
    assert changed_keys(spec, chosen_keys).keys() == {
        "cluster.workers",
        "train.loss_chunk_rows",
        "train.micro_batches",
        "train.micro_batch_size",
        "train.compile",
        "cluster.ep",
    }
    with_room, chosen_with_room = choose_on_paper(open_spec(accelerator={}), 1, 4)
    assert (with_room.cluster.strategy, with_room.train.recompute) == ("ddp", "none")
    assert (chosen_with_room["train.micro_batches"], chosen_with_room["train.micro_batch_size"]) == (4, 4)


def test_keys_that_the_spec_sets_stay_even_if_memory_does_not_suffice():
    adapted, chosen_keys = choose_on_paper(open_spec(ep=1), 1, 4)
    assert "cluster.ep" not in chosen_keys
    assert (chosen_keys["cluster.strategy"], chosen_keys["cluster.shard_experts"]) == ("fsdp", True)
    adapted, chosen_keys = choose_on_paper(open_spec(ep=1, strategy="ddp"), 1, 4)
    assert not {"cluster.ep", "cluster.strategy"} & chosen_keys.keys()
    assert memory(adapted) > 150e6
    assert chosen_keys["train.micro_batch_size"] == 1
    assert chosen_keys["train.recompute"] in ("exchange", "block")


def test_precisions_are_not_chosen():
    adapted, _ = choose_on_paper(open_spec(accelerator={"memory": 1e6}), 1, 4)
    assert adapted.train.moment_precision == adapted.train.residual_precision == "float32"
    assert adapted.cluster.gather_precision == "float32"


def test_groups_of_experts_stay_on_nodes_where_straddling_is_refused():
    nodes = [Node(f"n{i}", 2, 2) for i in range(4)]
    slow_memory = {"accelerator": {"memory": 150e6, "memory_bandwidth": 1e9}, "workers": 8, "strategy": "ddp"}
    assert choose_settings(open_spec(8, **slow_memory), nodes)[0].cluster.ep > 2
    assert choose_settings(open_spec(8, straddling="refuse", **slow_memory), nodes)[0].cluster.ep == 2


def test_a_recorded_choice_is_kept():
    first_spec, _ = choose_settings(open_spec(accelerator={"memory": 60e6}))
    recorded_spec = validate_section(RunSpec, first_spec.model_dump(mode="json"), "recorded")
    roomy_spec = choose_settings(open_spec(accelerator={}))[0]
    assert roomy_spec.train.recompute != recorded_spec.train.recompute
    assert keep_choice(roomy_spec, recorded_spec).train == recorded_spec.train
    assert choose_settings(recorded_spec) == (recorded_spec, {})


def test_an_elastic_run_fits_with_its_fewest_workers():
    spec = open_spec(8, workers={"min": 2, "max": 4}, accelerator={"memory": 300e6})
    assert memory(spec.with_workers(2)) > 300e6
    chosen_spec, _ = choose_settings(spec)
    assert chosen_spec.cluster.workers == spec.cluster.workers
    assert chosen_spec.worker_counts[0] == 2
    assert memory(chosen_spec.with_workers(2)) <= MEMORY_SHARE * 300e6


def test_micro_batches_are_the_largest_that_fit():
    train = {"micro_batches": 1, "micro_batch_size": 64, "recompute": "none", "loss_chunk_rows": None}
    spec = tiny_spec(model={"vocab_size": 100_000}, train=train)
    adapted, _ = choose_on_paper(spec, 1, 4)
    assert (adapted.train.micro_batches, adapted.train.micro_batch_size) == (4, 16)
    limit = {"accelerator": {"memory": memory(adapted)}, "strategy": "ddp", "ep": 1}
    adapted, _ = choose_on_paper(spec.model_copy(update={"cluster": tiny_spec(cluster=limit).cluster}), 1, 4)
    assert (adapted.train.micro_batches, adapted.train.micro_batch_size) == (8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "cluster": {"workers": 3, "ep": 3},
                "train": {"micro_batches": 3},
                "model": {"moe": {"d_expert": 24, "experts": 3}},
            },
            "cluster.ep: 3 does not divide 8 GPUs",
        ),
        (
            {"cluster": {"workers": 3, "strategy": "fsdp", "shard_group": 3}, "train": {"micro_batches": 3}},
            "cluster.shard_group: 3 does not divide 8 GPUs",
        ),
        (
            {"train": {"micro_batches": 3, "micro_batch_size": 5}},
            "train.micro_batch_size: 5 in train.micro_batches: 3 make 15 samples in a step, which 8 GPUs cannot share",
        ),
        (
            {"model": {"moe": {"d_expert": 24, "capacity_factor": 1.25}}},
            "train.micro_batches: 4 is not a multiple of 8 GPUs, and model.moe.capacity_factor: 1.25 forbids other",
        ),
        (
            {"model": {"moe": {"d_expert": 24, "kernel": "cpp"}}, "train": {"precision": "bfloat16"}},
            "model.moe.kernel cpp is for CPUs",
        ),
    ],
)
def test_keys_that_rule_eight_gpus_out_are_named_with_their_values(changes, message):
    with pytest.raises(SpecError, match=re.escape(message)):
        choose_on_paper(tiny_spec(**changes), 1, 8)
