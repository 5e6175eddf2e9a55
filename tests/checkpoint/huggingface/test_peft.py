"""Tests of adapters in PEFT's layout, both ways: logits equal those of PEFT on the exported base in transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhmoe_ray.api.run import Run
from mhmoe_ray.checkpoint.huggingface.export import export
from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
from mhmoe_ray.checkpoint.load import load_model, load_tensors
from mhmoe_ray.checkpoint.manifest import AdapterRecord, checkpoint_name, newest_checkpoint, read_manifest
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.model.adapter import add_adapters, is_adapter
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.router import Router
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import ModelSpec, MoESpec
from mhmoe_ray.spec.adapter import AdapterSpec, target_widths
from tests.checkpoint.huggingface.conftest import MIXTRAL, MODELS, SEQ_LEN, SIZES, make_run
from tests.support.ranks import run_ranks
from tests.support.saved import commit_checkpoint, save_tensors
from tests.support.specs import tiny_spec
from tests.support.starts import TRAIN, make_source, start_run
from tests.train import jobs

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

TOKENS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))
MOE = {"heads": 1, "experts": 4, "d_expert": 24, "every": 1}
SPECS = {
    "mixtral": MIXTRAL,
    "qwen3_moe": ModelSpec(
        **{**SIZES, "layers": 3}, d_ff=48, qk_norm="head", kv_heads=2, moe=MoESpec(**{**MOE, "dense_first": 1})
    ),
    "olmoe": ModelSpec(**SIZES, qk_norm="all", moe=MoESpec(**MOE)),
    "mhmoe": MODELS["llama"],
    "mhmoe subln": ModelSpec(**SIZES, d_ff=48, backbone="subln", moe=MoESpec(heads=2, d_expert=24, d_shared=16)),
    "llama": MODELS["dense"],
}
CASES = [(kind, target) for kind, spec in SPECS.items() for target in [*target_widths(spec), "all"]]


def make_adapter_run(folder, model: ModelSpec, targets=(), b_scale: float = 0.1) -> RunDir:
    """Return a run with a base as checkpoint of step 0, and a random adapter of it as that of step 7."""
    run = make_run(folder, model)
    base = run.checkpoints / checkpoint_name(0, 0)
    (run.checkpoints / checkpoint_name(7, 1)).rename(base)
    (base / "manifest.json").unlink()
    fields = {"tokens": 448, "position": 7, "seed": 3, "seq_len": SEQ_LEN}
    commit_checkpoint(base, model, step=0, **fields)
    spec = AdapterSpec(rank=4, alpha=6, targets=list(targets or target_widths(model)))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        adapter = {
            name: torch.randn(p.shape) * (b_scale if ".lora_b" in name else 0.1)
            for name, p in adapted_model(model, spec).named_parameters()
            if is_adapter(name)
        }
    checkpoint = run.checkpoints / checkpoint_name(7, 1)
    save_tensors(checkpoint / "weights", adapter)
    record = AdapterRecord(spec=spec, base=base.name, base_sha256=read_manifest(base).weights_sha256)
    commit_checkpoint(checkpoint, model, step=7, adapter=record, **fields)
    return run


def adapted_model(model: ModelSpec, spec: AdapterSpec) -> Decoder:
    decoder = Decoder(model)
    add_adapters(decoder, spec)
    return decoder.eval()


@torch.no_grad()
def our_logits(model: Decoder) -> torch.Tensor:
    return model(TOKENS, document_BT=torch.zeros_like(TOKENS) if model.spec.document_masks else None).logits_BTV


def unmerged_logits(run: RunDir) -> torch.Tensor:
    checkpoint, manifest, _ = newest_checkpoint(run)
    model = adapted_model(manifest.model, manifest.adapter.spec)
    for is_own, folder in ((False, checkpoint.with_name(manifest.adapter.base)), (True, checkpoint)):
        tensors = {name: t for name, t in model.named_tensors().items() if is_adapter(name) == is_own}
        load_tensors(folder / "weights", tensors)
    return our_logits(model)


def merged_logits(run: RunDir) -> torch.Tensor:
    return our_logits(load_model(newest_checkpoint(run, ("weights",)).checkpoint)[0])


def load_base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def peft_logits(base_folder, adapter_folder) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base_folder), adapter_folder)
    stored = load_file(adapter_folder / "adapter_model.safetensors")
    lora_names = [name for name in model.state_dict() if ".lora_" in name]
    assert {name.replace(".default", "") for name in lora_names} == stored.keys()
    return model(TOKENS).logits


def export_base(run: RunDir, folder):
    base = run.checkpoints / checkpoint_name(0, 0)
    export(base, read_manifest(base), folder)
    return folder


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "target"), CASES)
def test_an_exported_adapter_has_equal_logits_in_peft(tmp_path, kind, target):
    targets = [] if target == "all" else [target]
    run = make_adapter_run(tmp_path, SPECS[kind], targets)
    base = export_base(run, tmp_path / "base")
    result = Run(run).export(tmp_path / "adapter", base=base)
    assert (result.model_type, result.base) == (kind.split()[0], str(base))
    expected = merged_logits(run)
    assert_close(unmerged_logits(run), expected)
    assert_close(peft_logits(base, tmp_path / "adapter"), expected)
    assert (expected - our_logits(load_model(run.checkpoints / checkpoint_name(0, 0))[0])).abs().max() > 0.01
    imported_run = import_folder(tmp_path / "adapter", None, tmp_path / "runs", None)
    assert_close(merged_logits(imported_run), expected)


@pytest.fixture(scope="module", params=["mixtral", "olmoe", "mhmoe"])
def exported(request, tmp_path_factory):
    """Return the model's kind, a base with one layer of experts, and the adapter of its experts, both exported."""
    folder, spec = tmp_path_factory.mktemp("exported"), SPECS[request.param]
    run = make_adapter_run(folder, spec.model_copy(update={"layers": 1}).with_moe(with_every_layer(spec)), ["experts"])
    base = export_base(run, folder / "base")
    Run(run).export(folder / "adapter", base=base)
    return run, base, folder / "adapter"


def with_every_layer(spec: ModelSpec) -> MoESpec:
    return spec.moe.model_copy(update={"every": 1})


@pytest.mark.parametrize("expert", [0, 3])
def test_the_adapter_of_one_expert_changes_its_tokens_alone(exported, tmp_path, expert):
    run, base, adapter = exported
    changed = shutil.copytree(adapter, tmp_path / "changed")
    tensors = load_file(changed / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if f".experts.{expert}." in name:  # a linear layer of MH-MoE
            tensor.mul_(2)
        elif (
            name.endswith("lora_B.weight")
            and ".experts." in name
            and not any(c.isdigit() for c in name.split("experts")[1])
        ):
            tensor.view(len(tensor), -1, 4)[..., expert].mul_(2)
    save_file(tensors, changed / "adapter_model.safetensors")
    difference = (peft_logits(base, changed) - peft_logits(base, adapter)).abs().amax(-1).flatten()
    expert_choices = []
    model = load_model(newest_checkpoint(run, ("weights",)).checkpoint)[0]
    [router] = [module for module in model.modules() if isinstance(module, Router)]
    router.register_forward_hook(lambda *args: expert_choices.append(args[-1].expert_NK))
    our_logits(model)
    is_routed = (expert_choices[0] == expert).view(TOKENS.numel(), -1).any(1)
    assert 0 < is_routed.sum() < TOKENS.numel()
    assert difference[is_routed].min() > 1e-4
    assert difference[~is_routed].max() == 0


def make_peft_folder(base, folder, **options):
    """Save an adapter with random tensors that PEFT made for an exported base."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_base(base), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
PEFT_OPTIONS = {
    "attention": {"target_modules": ATTENTION, "r": 4, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    "experts": {"target_modules": ["q_proj"], "target_parameters": PARAMETERS, "rank_pattern": {"gate_up_proj": 6}},
    "down alone": {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True},
    "router": {"target_modules": [], "target_parameters": ["gate.weight"], "alpha_pattern": {"gate.weight": 20}},
    "all": {"target_modules": "all-linear", "layers_to_transform": None},
}


STACKS = ("experts", "down alone")
"""Options for experts that are parameters, which those of MH-MoE are not."""


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (k, o)
        for k in ("mixtral", "qwen3_moe", "olmoe", "mhmoe")
        for o in PEFT_OPTIONS
        if k != "mhmoe" or o not in STACKS
    ],
)
def test_an_adapter_made_by_peft_is_imported(tmp_path, kind, options):
    base = export_base(make_adapter_run(tmp_path, SPECS[kind]), tmp_path / "base")
    adapter = make_peft_folder(base, tmp_path / "adapter", **PEFT_OPTIONS[options])
    imported_run = import_folder(adapter, None, tmp_path / "runs", None)
    assert_close(merged_logits(imported_run), peft_logits(base, adapter))


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_an_adapter_of_transformers_4_with_a_layer_per_matrix_is_imported(tmp_path, kind):
    base = export_base(make_adapter_run(tmp_path, SPECS[kind]), tmp_path / "base")
    matrices = {
        name: t
        for file in base.glob("*.safetensors")
        for name, t in load_file(file).items()
        if ".experts." in name or name.endswith("gate.weight")
    }
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, matrix in matrices.items():
        for part, shape in (("A", (4, matrix.shape[1])), ("B", (matrix.shape[0], 4))):
            key = f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight"
            tensors[key] = torch.randn(shape, generator=generator) * 0.1
    modules = {name.split(".")[-2] for name in matrices}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": sorted(modules)}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config["base_model_name_or_path"] = str(base)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    imported_run = import_folder(tmp_path / "adapter", None, tmp_path / "runs", None)
    assert_close(merged_logits(imported_run), peft_with_given_tensors(base, tmp_path / "adapter"))


@torch.no_grad()
def peft_with_given_tensors(base, adapter) -> torch.Tensor:
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(base), adapter)(TOKENS).logits


def test_a_run_starts_from_an_adapter_and_exports_the_adapter_of_a_folder(tmp_path):
    source = make_source(tmp_path, model=MIXTRAL.model_dump())
    newest = newest_checkpoint(source)
    export(newest.checkpoint, newest.manifest, tmp_path / "base")
    adapter = make_peft_folder(tmp_path / "base", tmp_path / "peft", **PEFT_OPTIONS["experts"])
    merged_run = start_run(tmp_path, str(adapter), {})
    assert_close(merged_logits(merged_run), peft_logits(tmp_path / "base", adapter))
    train = {**tiny_spec(train=TRAIN).train.model_dump(), "adapter": {"rank": 4, "targets": ["experts", "query"]}}
    run = start_run(tmp_path, str(tmp_path / "base"), {}, train=train)
    run_ranks(1, jobs.continue_and_save, run.spec(), run.path, newest_checkpoint(run).checkpoint, 2)
    result = Run(run).export(tmp_path / "adapter")
    assert result.base == str(tmp_path / "base")
    assert_close(peft_logits(result.base, tmp_path / "adapter"), merged_logits(run))


def edit(folder, tensor_edit=None, **fields):
    """Change the configuration and the tensors of an adapter's folder."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    if tensor_edit:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(tensor_edit(tensors), folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
UNIMPORTABLE = {
    "another method": ({"peft_type": "IA3"}, r"peft_type is 'IA3'.*only plain LoRA"),
    "DoRA": ({"use_dora": True}, "use_dora is True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    "a changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "another rank": ({"r": 3}, "has rank 4, not 3"),
    "no base": ({"base_model_name_or_path": None}, "none is named"),
    "an unknown module": (
        {"tensor_edit": lambda t: {**t, "base_model.model.lm_heads.lora_A.weight": torch.ones(4, 32)}},
        r"lm_heads\.lora_A\.weight adapts nothing",
    ),
    "a tensor of DoRA": (
        {"tensor_edit": lambda t: {**t, f"{Q}magnitude_vector": torch.ones(32)}},
        "q_proj.lora_magnitude_vector adapts nothing",
    ),
    "half an adapter": ({"tensor_edit": lambda t: {k: v for k, v in t.items() if k != f"{Q}B.weight"}}, "lacks one of"),
    "another shape": (
        {"tensor_edit": lambda t: {**t, f"{Q}A.weight": torch.ones(4, 30)}},
        r"q_proj has matrices of shapes \(4, 30\) and \(32, 4\), and its base needs \(4, 32\)",
    ),
    "no effect": ({"tensor_edit": lambda t: {k: v * ("lora_A" in k) for k, v in t.items()}}, "changes nothing"),
}


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory):
    """Return a run with an adapter, and its exported base."""
    folder = tmp_path_factory.mktemp("adapter")
    run = make_adapter_run(folder, MIXTRAL)
    return run, export_base(run, folder / "base")


@pytest.mark.parametrize("case", UNIMPORTABLE)
def test_what_cannot_be_imported_is_refused_in_one_line(adapter_run, tmp_path, case):
    changes, reason = UNIMPORTABLE[case]
    run, base = adapter_run
    Run(run).export(tmp_path / "adapter", base=base)
    edit(tmp_path / "adapter", **changes)
    with pytest.raises(CheckpointError, match=reason) as error:
        import_folder(tmp_path / "adapter", None, tmp_path / "runs", None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_exported_is_refused_in_one_line(adapter_run, tmp_path):
    run, _ = adapter_run
    with pytest.raises(CheckpointError, match=r"in no folder that PEFT could load; export the base .*--base BASE"):
        Run(run).export(tmp_path / "out")
    other_base = export_base(make_adapter_run(tmp_path, SPECS["olmoe"]), tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not the base of the adapter, but differs in model"):
        Run(run).export(tmp_path / "out", base=other_base)
    idle_run = make_adapter_run(tmp_path, MIXTRAL, b_scale=0)
    for merge in (False, True):
        with pytest.raises(CheckpointError, match="its adapter changes nothing"):
            Run(idle_run).export(tmp_path / "out", merge=merge)
    assert not (tmp_path / "out").exists()
    Run(run).export(tmp_path / "out", merge=True)
    assert_close(peft_free_logits(tmp_path / "out"), merged_logits(run))


@torch.no_grad()
def peft_free_logits(folder) -> torch.Tensor:
    return load_base(folder)(TOKENS).logits
