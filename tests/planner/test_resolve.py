from pathlib import Path

import pytest
import yaml

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.resolve import all_presets, preset_models, resolve_spec
from mhmoe_ray.planner.search import MEMORY_SHARE
from mhmoe_ray.spec import dump_spec
from tests.support.specs import load_relative_spec

BASE = {
    "name": "a",
    "preset": "mhmoe",
    "data": {"sources": {"web": {"path": "raw"}}, "prepared": "prepared"},
}
ENCODERS_DATA = {
    "sources": {
        "texts": {"path": "raw"},
        "images": {"path": "raw", "format": "images"},
        "pairs": {"path": "raw", "format": "coco"},
    },
    "parts": {
        "texts": {"sources": ["texts"], "micro_batch_size": 11},
        "images": {"sources": ["images"], "micro_batch_size": 11},
        "pairs": {"sources": ["pairs"], "micro_batch_size": 10},
    },
    "prepared": "prepared",
}
MIXTRALS_TRAINING = ["train.steps=1", "train.micro_batches=1", "train.micro_batch_size=1"]


@pytest.fixture
def write_spec(tmp_path):
    """Return a function that writes a spec file, by default with the keys of `BASE`, and returns the resolved spec."""

    def write(tree=BASE, overrides=(), **keys):
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump({**tree, **keys}))
        return load_relative_spec(path, overrides)

    return write


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, size, _ in all_presets()])
def test_every_preset_makes_a_complete_spec_that_reads_back(write_spec, tmp_path, name, size):
    overrides = [f"preset={name}", *([f"size={size}"] if size else [])]
    data = ENCODERS_DATA if "multimodal" in name else BASE["data"]
    spec = write_spec(overrides=overrides + (MIXTRALS_TRAINING if "mixtral" in name else []), data=data)
    preset = next(p for n, s, p in all_presets() if (n, s) == (name, size))
    model, reference = preset_models(preset)
    assert spec.model == model
    assert spec.reference_model == reference
    assert (spec.reference and spec.reference.name) == preset.reference
    (tmp_path / "whole.yaml").write_text(dump_spec(spec))
    assert load_relative_spec(tmp_path / "whole.yaml") == spec


def test_keys_of_the_sections_override_a_preset(write_spec):
    spec = write_spec(overrides=["model.moe.router=xmoe", "train.steps=7", "model.vocab_size=300", "train.lr=1e-3"])
    assert (spec.model.moe.router, spec.train.steps, spec.model.vocab_size, spec.train.lr) == ("xmoe", 7, 300, 1e-3)
    assert spec.model.d_model == 128
    assert spec.reference_model.moe.router == "linear"
    assert write_spec(overrides=["model.moe=null"]).model.moe is None


def test_size_sets_width_depth_heads_and_learning_rate(write_spec):
    tiny, small, base = (write_spec(size=size) for size in ("tiny", "small", "base"))
    for key in ("d_model", "layers", "d_ff", "vocab_size"):
        assert getattr(tiny.model, key) < getattr(small.model, key) < getattr(base.model, key)
    assert tiny.model.attention_heads <= small.model.attention_heads < base.model.attention_heads
    assert tiny.train.lr > small.train.lr > base.train.lr == 6e-4
    assert (base.train.min_lr, base.train.warmup_steps, base.data.seq_len) == (3e-5, 375, 2048)
    assert write_spec() == tiny


def test_a_matched_family_stays_matched_when_heads_or_choices_change(write_spec):
    spec = write_spec(size="base", overrides=["model.moe.heads=3", "model.moe.top_k=3"])
    assert (spec.model.moe.d_expert, spec.model.moe.experts) == (512, 96)
    few_experts = write_spec(size="base", overrides=["model.moe.experts=16"])
    assert (few_experts.model.moe.d_expert, few_experts.model.moe.experts) == (768, 16)
    wide = write_spec(size="base", overrides=["model.moe.d_expert=1536"])
    assert (wide.model.moe.d_expert, wide.model.moe.experts) == (1536, 21)  # twice as wide, so about half as many
    spread = ["model.moe.d_expert=1536", "cluster.workers=2", "cluster.ep=2", "train.micro_batches=2"]
    assert write_spec(size="base", overrides=spread).model.moe.experts == 20
    odd = ["cluster.workers=3", "cluster.ep=3", "train.micro_batches=3"]
    # The number has to be a multiple of 3, and by preference of 8 or 4 too. The multiples of 24 and of 12 are too far
    # from the exact number, 41, so it becomes a multiple of 6.
    assert write_spec(size="base", overrides=odd).model.moe.experts == 42
    fixed_keys = write_spec(size="base", overrides=["model.moe.d_expert=64", "model.moe.experts=4"])
    assert (fixed_keys.model.moe.d_expert, fixed_keys.model.moe.experts) == (64, 4)


@pytest.mark.parametrize("preset", ["mhmoe", "smoe", "p2-mhmoe-h2", "mixtral-8x7b", "deepseek"])
@pytest.mark.parametrize("reference", ["", "smoe", "dense"])
def test_experts_in_every_layer_are_compared_with_experts_in_every_layer(write_spec, preset, reference):
    overrides = MIXTRALS_TRAINING if "mixtral" in preset else []
    if reference:
        overrides = [*overrides, f"reference={reference}"]
    spec = write_spec(overrides=[f"preset={preset}", "model.moe.every=1", *overrides])
    assert spec.model.moe_layers == spec.model.layers
    assert spec.model.d_ff is None
    compared = spec.reference_model
    if reference == "dense" or (preset == "smoe" and not reference):
        assert compared.d_ff
    elif compared:
        assert compared.moe_layers == compared.layers


@pytest.mark.parametrize("d_ff", [[], ["model.d_ff=200"]])
@pytest.mark.parametrize("reference", [[], ["reference=deepseek"], ["reference=dense"]])
def test_dense_layers_before_experts_in_every_layer_keep_their_width(write_spec, d_ff, reference):
    spec = write_spec(overrides=["model.moe.every=1", "model.moe.dense_first=1", *d_ff, *reference])
    assert spec.model.moe_layers == spec.model.layers - 1
    assert spec.reference_model.d_ff == spec.model.d_ff == (200 if d_ff else 384)
    if spec.reference.name != "dense":
        assert spec.reference_model.moe_layers == spec.model.moe_layers


def test_experts_beside_dense_layers_are_compared_at_the_same_layers():
    spec = load_relative_spec(Path("jobs/pictures.yaml"), ["reference=smoe"])
    assert spec.reference_model.moe_layers == spec.model.moe_layers == 2
    assert spec.reference_model.d_ff == spec.model.d_ff
    assert load_relative_spec(
        Path("jobs/pictures.yaml"), ["model.moe.dense_first=0", "reference=smoe"]
    ).reference_model.d_ff


@pytest.mark.parametrize("reference", ["reference=dense", "reference={name: mine, moe: null}"])
def test_a_vision_model_with_adaptive_experts_is_compared_with_a_dense_one(reference):
    spec = load_relative_spec(Path("jobs/vision.yaml"), [reference])
    assert spec.model.vision.adaptive is not None
    assert spec.reference_model.moe is None
    assert spec.reference_model.vision.adaptive is None
    assert spec.reference_model.vision.tasks == spec.model.vision.tasks
    with pytest.raises(SpecError, match="chooses the number of experts, but"):
        load_relative_spec(Path("jobs/vision.yaml"), [reference, "model.moe=null"])


def test_a_spec_records_its_preset(write_spec):
    assert write_spec().origin == "mhmoe tiny"
    assert write_spec(size="small").origin == "mhmoe small"
    assert write_spec(overrides=["preset=p2-smoe", "model.d_model=768"]).origin == "p2-smoe"


def test_match_on_a_model_without_a_preset(write_spec):
    model = {"vocab_size": 300, "d_model": 96, "layers": 2, "attention_heads": 4, "d_ff": 256}
    tree = {k: v for k, v in BASE.items() if k != "preset"}
    tree["data"] = {**tree["data"], "seq_len": 16}
    train = {"steps": 1, "micro_batches": 1, "micro_batch_size": 1}
    spec = write_spec(
        tree, model={**model, "moe": {"heads": 4, "top_k": 2}}, train=train, match={"to": "smoe", "by": "both"}
    )
    assert spec.reference.name == "smoe"
    assert spec.reference.moe.d_expert == 256
    # The width follows the second MH-MoE paper's rule (k0 f0 - 2/3 d) / k, rounded to a multiple of 8. The reference
    # has the top-k k0 = 1 and experts of width f0 = 256.
    assert spec.model.moe.d_expert == round((256 - 2 / 3 * 96) / 2 / 8) * 8


def test_a_match_or_a_reference_replaces_that_of_the_preset(write_spec):
    assert write_spec(match={"to": "dense", "by": "flops"}).reference.name == "dense"
    assert write_spec(reference="fine_grained").reference.moe.experts == 16
    assert write_spec(reference=None).reference is None
    named_reference = write_spec(reference={"name": "mine", "moe": {"d_expert": 8}})
    assert named_reference.reference_model.moe.d_expert == 8


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["preset=mhmeo"], "preset mhmeo: there is no such preset; did you mean 'mhmoe'?"),
        (["preset=null", "size=tiny"], "'size' is given without preset, so it would be ignored"),
        (["size=huge"], "'size': Input should be 'tiny', 'small' or 'base'"),
        (["match.to=smoe", "match.by=both", "model.moe.experts=8"], "model.moe.experts would be ignored"),
        (["match.to=smoe", "match.by=params", "model.moe.d_expert=8"], "model.moe.d_expert would be ignored"),
        (["match.to=smoe"], "'match.by' is missing"),
        (["match.to=smoe", "match.by=both", "reference=dense"], "a matched model is compared with its match"),
        (["match.to=smoe", "match.by=both", "model.moe=null"], "'match' is for experts, but this model has none"),
        (
            ["reference={name: mine, moe: {heads: 7, d_expert: 3}}"],
            "reference mine: 'model': d_model 128 does not split",
        ),
        (["reference={nme: mine}"], "unknown key 'reference.nme'; did you mean 'name'?"),
        (["reference=3"], "'reference' is a value, not a section"),
        (["reference=nothing"], "preset nothing: there is no such preset"),
        (["preset=null", "reference=smoe"], "'model' is missing"),
        (["model.dropout=1"], "'model.dropout': Input should be less than 1"),
        (["model.moe.top_k=100000"], "but each row needs 100000"),
        (["preset=smoe", "model.d_ff=wide"], "model.d_ff: experts of a family follow from it, and it is 'wide'"),
        (["preset=mixtral-8x7b", *MIXTRALS_TRAINING, "model.d_ff=8"], "so d_ff would be ignored"),
        (["preset=mixtral-8x7b", *MIXTRALS_TRAINING, "model.moe.every=2"], "d_ff is missing: 16 of the 32 layers"),
        (["presett=mhmoe"], "unknown key 'presett'; did you mean 'preset'?"),
        (["model=3"], "'model' is a value, not a section"),
        (["model.moe=3"], "'model.moe' is a value, not a section"),
        *(
            ([f"model.moe={falsy}"], "is a value, not a section; write its keys below it, or null for a dense model")
            for falsy in ("false", "0", "''", "[]")
        ),
        (["model.d_ff=wide"], "'model.d_ff': Input should be a valid integer"),
        (["preset=dense", "match.to=smoe", "match.by=both"], "'match' is for experts, but this model has none"),
    ],
)
def test_mistakes_are_reported_in_one_line(write_spec, overrides, reason):
    with pytest.raises(SpecError) as error:
        write_spec(overrides=overrides)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_torch_and_ray_are_not_imported():
    import subprocess
    import sys

    code = "import sys, mhmoe_ray.planner.resolve; print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_specs_without_a_preset_stay_the_same():
    from mhmoe_ray.spec import load_resolved_spec

    assert load_relative_spec(Path("jobs/quickstart.yaml")) == load_resolved_spec(Path("jobs/quickstart.yaml"))


SMOE_BASE = {"name": "a", "preset": "smoe", "size": "base", "data": {"sources": {"t": {"path": "t"}}, "prepared": "p"}}


@pytest.mark.parametrize(("workers", "memory"), [(1, 80e9), (8, 80e9), (8, 24e9)])
def test_a_preset_fills_the_memory_of_gpus(workers, memory):
    """The number of samples per step stays 256, and micro-batches of twice the size would not fit."""
    cluster = {"gpus_per_worker": 1, "workers": workers, "accelerator": {"memory": memory}}
    spec = resolve_spec({**SMOE_BASE, "cluster": cluster}, "spec")
    train = spec.train
    assert train.micro_batches * train.micro_batch_size == 256
    assert train.micro_batch_size > 1
    assert train.micro_batches % workers == 0
    assert compute_memory(spec).total <= MEMORY_SHARE * memory
    twice = spec.model_copy(update={"train": train.model_copy(update={"micro_batch_size": 2 * train.micro_batch_size})})
    assert compute_memory(twice).total > MEMORY_SHARE * memory or train.micro_batches == workers


@pytest.mark.parametrize(
    "change",
    [
        {"cluster": {}},
        {"cluster": {"gpus_per_worker": 1}, "train": {"micro_batch_size": 1}},
        {"cluster": {"gpus_per_worker": 1}, "model": {"moe": {"capacity_factor": 1.0}}},
    ],
    ids=["CPUs", "own micro-batches", "static routing"],
)
def test_micro_batches_of_a_preset_stay_otherwise(change):
    train = resolve_spec({**SMOE_BASE, **change}, "spec").train
    assert (train.micro_batches, train.micro_batch_size) == (256, 1)
