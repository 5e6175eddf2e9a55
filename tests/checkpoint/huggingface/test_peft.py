"""Tests of adapters in PEFT's layout, both ways: logits equal those of PEFT on the exported base in transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhmoe_ray.api.model_source import folder_source
from mhmoe_ray.api.run import Run
from mhmoe_ray.checkpoint.huggingface.export import export
from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
from mhmoe_ray.checkpoint.load import load_model
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

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))
MOE = {"heads": 1, "experts": 4, "d_expert": 24, "every": 1}
SPECS = {
    "mixtral": MIXTRAL,
    "qwen3_moe": ModelSpec(
        **{**SIZES, "layers": 3}, d_ff=48, qk_norm="head", kv_heads=2, moe=MoESpec(**MOE, dense_first=1)
    ),
    "olmoe": ModelSpec(**SIZES, qk_norm="all", moe=MoESpec(**MOE)),
    "mhmoe": MODELS["llama"],
    "mhmoe subln": ModelSpec(**SIZES, d_ff=48, backbone="subln", moe=MoESpec(heads=2, d_expert=24, d_shared=16)),
    "llama": MODELS["dense"],
}


def make_adapter_run(folder, model: ModelSpec, targets=(), b_scale: float = 0.1) -> RunDir:
    """Return a run with a base as checkpoint of step 0, and a random adapter of it as that of step 7."""
    run = make_run(folder, model)
    checkpoint, base = (run.checkpoints / checkpoint_name(*number) for number in ((7, 1), (0, 0)))
    checkpoint.rename(base)
    (base / "manifest.json").unlink()
    fields = {"tokens": 448, "position": 7, "seed": 3, "seq_len": SEQ_LEN}
    commit_checkpoint(base, model, step=0, **fields)
    spec = AdapterSpec(rank=4, alpha=6, targets=list(targets or target_widths(model)))
    with torch.device("meta"):
        decoder = Decoder(model)
        add_adapters(decoder, spec)
    generator = torch.Generator().manual_seed(2)
    adapter = {
        name: torch.randn(p.shape, generator=generator) * (b_scale if ".lora_b" in name else 0.1)
        for name, p in decoder.named_parameters()
        if is_adapter(name)
    }
    save_tensors(checkpoint / "weights", adapter)
    record = AdapterRecord(spec=spec, base=base.name, base_sha256=read_manifest(base).weights_sha256)
    commit_checkpoint(checkpoint, model, step=7, adapter=record, **fields)
    return run


def export_base(run: RunDir, folder):
    """Export the oldest checkpoint of a run."""
    base = min(run.checkpoints.iterdir())
    export(base, read_manifest(base), folder)
    return folder


@torch.no_grad()
def our_logits(run: RunDir) -> torch.Tensor:
    """Return the logits of the newest checkpoint of a run: of the sums, if it has an adapter."""
    model, *_ = load_model(newest_checkpoint(run, ("weights",)).checkpoint)
    return model(TOKENS, document_BT=torch.zeros_like(TOKENS) if model.spec.document_masks else None).logits_BTV


def load_in_transformers(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def peft_logits(base, adapter=None) -> torch.Tensor:
    """Return the logits of a folder in transformers, with an adapter by PEFT if one is given."""
    from peft import PeftModel

    model = load_in_transformers(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return model(TOKENS).logits


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "target"), [(kind, target) for kind, spec in SPECS.items() for target in [*target_widths(spec), "all"]]
)
def test_an_exported_adapter_has_equal_logits_in_peft_and_merged(tmp_path, kind, target):
    run = make_adapter_run(tmp_path, SPECS[kind], [] if target == "all" else [target])
    base, adapter, merged = export_base(run, tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    result = Run(run).export(adapter, base=base)
    assert (result.model_type, result.base) == (kind.split()[0], str(base))
    expected = our_logits(run)
    assert (expected - peft_logits(base)).abs().max() > 0.01
    assert_close(peft_logits(base, adapter), expected)
    Run(run).export(merged, merge=True)
    assert_close(peft_logits(merged), expected)
    notes = []
    imported_run = import_folder(adapter, None, tmp_path / "runs", None, on_note=notes.append)
    assert notes == [f"{adapter} is an adapter, so it is merged into its base {base}"]
    assert_close(our_logits(imported_run), expected)


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "olmoe", "mhmoe"])
def exported(request, tmp_path_factory):
    """Return a run with one layer, the adapter of whose experts is exported, and the folders of base and adapter."""
    folder, spec = tmp_path_factory.mktemp("exported"), SPECS[request.param]
    moe = spec.moe.model_copy(update={"every": 1, "dense_first": 0})
    spec = spec.model_copy(update={"layers": 1, "moe": moe, "d_ff": None})
    run = make_adapter_run(folder, spec, ["experts"])
    base = export_base(run, folder / "base")
    Run(run).export(folder / "adapter", base=base)
    return run, base, folder / "adapter"


@pytest.mark.parametrize("expert", [0, 3])
def test_the_adapter_of_one_expert_changes_its_tokens_alone(exported, tmp_path, expert):
    run, base, adapter = exported
    changed = shutil.copytree(adapter, tmp_path / "changed")
    tensors = load_file(changed / WEIGHTS)
    for name, tensor in tensors.items():
        if name.endswith(("experts.lora_B.weight", "experts.base_layer.lora_B.weight")):
            tensor.view(len(tensor), -1, 4)[..., expert].mul_(2)
        elif f".experts.{expert}." in name:  # a linear layer of MH-MoE
            tensor.mul_(2)
    save_file(tensors, changed / WEIGHTS)
    difference = (peft_logits(base, changed) - peft_logits(base, adapter)).abs().amax(-1).flatten()
    model, *_ = load_model(newest_checkpoint(run, ("weights",)).checkpoint)
    [router] = [module for module in model.modules() if isinstance(module, Router)]
    choices = []
    router.register_forward_hook(lambda *args: choices.append(args[-1].expert_NK))
    with torch.no_grad():
        model(TOKENS, document_BT=torch.zeros_like(TOKENS) if model.spec.document_masks else None)
    is_routed = (choices[0] == expert).view(TOKENS.numel(), -1).any(1)
    assert 0 < is_routed.sum() < TOKENS.numel()
    assert difference[is_routed].min() > 1e-4
    assert difference[~is_routed].max() == 0


def make_peft_folder(base, folder, **options):
    """Save an adapter with random tensors that PEFT made for an exported base."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_in_transformers(base), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
PEFT_OPTIONS = {
    "attention": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "r": 4,
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"v_proj": 3},
    },
    "router": {"target_modules": [], "target_parameters": ["gate.weight"], "alpha_pattern": {"gate.weight": 20}},
    "all": {"target_modules": "all-linear", "layers_to_transform": None},
    "experts": {"target_modules": ["q_proj"], "target_parameters": PARAMETERS, "rank_pattern": {"gate_up_proj": 6}},
    "down alone": {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True},
}


@pytest.mark.parametrize(
    ("kind", "options"),
    # The experts of MH-MoE are linear layers, not parameters.
    [
        (k, o)
        for k in ("mixtral", "qwen3_moe", "olmoe", "mhmoe")
        for o in list(PEFT_OPTIONS)[: 3 if k == "mhmoe" else 5]
    ],
)
def test_an_adapter_made_by_peft_is_imported_and_exported(tmp_path, kind, options):
    base = export_base(make_run(tmp_path, SPECS[kind]), tmp_path / "base")
    adapter = make_peft_folder(base, tmp_path / "adapter", **PEFT_OPTIONS[options])
    run = import_folder(adapter, None, tmp_path / "runs", None)
    expected = peft_logits(base, adapter)
    assert_close(our_logits(run), expected)
    Run(run).export(tmp_path / "exported")
    assert_close(peft_logits(tmp_path / "exported"), expected)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_an_adapter_of_transformers_4_with_a_layer_per_matrix_is_imported(tmp_path, kind):
    base = export_base(make_run(tmp_path, SPECS[kind]), tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    tensors, modules = {}, set()
    for file in base.glob("*.safetensors"):
        for name, matrix in load_file(file).items():
            if ".experts." in name or name.endswith("gate.weight"):
                module = name.removesuffix(".weight")
                modules.add(module.rpartition(".")[2])
                for part, shape in (("A", (4, matrix.shape[1])), ("B", (matrix.shape[0], 4))):
                    tensors[f"base_model.model.{module}.lora_{part}.weight"] = torch.randn(shape, generator=generator)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({name: t * 0.1 for name, t in tensors.items()}, adapter / WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    (adapter / CONFIG).write_text(json.dumps({**config, "target_modules": sorted(modules)}))
    assert_close(our_logits(import_folder(adapter, None, tmp_path / "runs", None)), peft_logits(base, adapter))


def test_a_run_starts_from_an_adapter_and_exports_the_adapter_of_a_folder(tmp_path):
    source = make_source(tmp_path, model=MIXTRAL.model_dump())
    base = tmp_path / "base"
    Run(source).export(base)
    adapter = make_peft_folder(base, tmp_path / "peft", **PEFT_OPTIONS["experts"])
    assert_close(our_logits(start_run(tmp_path, str(adapter), {})), peft_logits(base, adapter))
    train = {**tiny_spec(train=TRAIN).train.model_dump(), "adapter": {"rank": 4, "targets": ["experts", "query"]}}
    run = start_run(tmp_path, str(base), {}, train=train)
    run_ranks(1, jobs.continue_and_save, run.spec(), run.path, newest_checkpoint(run).checkpoint, 2)
    assert Run(run).export(tmp_path / "adapter").base == str(base)
    assert_close(peft_logits(base, tmp_path / "adapter"), our_logits(run))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
UNIMPORTABLE = {
    "another method": ({"peft_type": "IA3"}, {}, r"peft_type is 'IA3'.*only plain LoRA"),
    "DoRA": ({"use_dora": True}, {}, "use_dora is True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save is \['lm_head'\]"),
    "a changed base": ({"init_lora_weights": "pissa"}, {}, "init_lora_weights is 'pissa'"),
    "a broken pattern": ({"rank_pattern": {"(": 2}}, {}, "adapter_config.json: rank_pattern"),
    "another rank": ({"r": 3}, {}, r"shapes \[\(4, 32\), \(32, 4\)\], and its rank and its base need \[\(3, 32\), "),
    "no base": ({"base_model_name_or_path": None}, {}, "none is named"),
    "an unknown module": ({}, {"base_model.model.lm_heads.lora_A.weight": torch.ones(4, 32)}, "adapts nothing that"),
    "a tensor of DoRA": ({}, {f"{Q}magnitude_vector": torch.ones(32)}, "q_proj.lora_magnitude_vector adapts nothing"),
    "half an adapter": ({}, {f"{Q}B.weight": None}, "q_proj lacks one of lora_A and lora_B"),
    "another shape": ({}, {f"{Q}A.weight": torch.ones(4, 30)}, r"q_proj has matrices of shapes \[\(4, 30\), \(32, 4\)"),
}


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory):
    """Return a run with an adapter, its exported base, and its exported adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    run = make_adapter_run(folder, MIXTRAL)
    base = export_base(run, folder / "base")
    Run(run).export(folder / "adapter", base=base)
    return run, base, folder / "adapter"


@pytest.mark.parametrize(("fields", "changed_tensors", "reason"), UNIMPORTABLE.values(), ids=UNIMPORTABLE)
def test_an_adapter_that_cannot_be_imported_is_refused(adapter_run, tmp_path, fields, changed_tensors, reason):
    adapter = shutil.copytree(adapter_run[2], tmp_path / "adapter")
    (adapter / CONFIG).write_text(json.dumps({**json.loads((adapter / CONFIG).read_text()), **fields}))
    tensors = {**load_file(adapter / WEIGHTS), **changed_tensors}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, adapter / WEIGHTS)
    assert_refused(lambda: import_folder(adapter, None, tmp_path / "runs", None), reason)
    assert not (tmp_path / "runs").exists()


def assert_refused(action, reason):
    with pytest.raises(CheckpointError, match=reason) as error:
        action()
    assert "\n" not in str(error.value)


def test_an_adapter_is_imported_into_its_own_base_alone_and_is_no_model(adapter_run, tmp_path):
    _, base, adapter = adapter_run
    assert_refused(lambda: folder_source(adapter), "it is an adapter, not a model; merge it into its base: mhmoe")
    other_base, adapter = shutil.copytree(base, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(file := next(other_base.glob("*.safetensors")))
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, file)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": str(other_base)}))
    assert_refused(
        lambda: import_folder(adapter, None, tmp_path / "runs", None),
        "has other weights than the base that the adapter was trained on",
    )
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, adapter / WEIGHTS)
    assert_refused(lambda: import_folder(adapter, None, tmp_path / "runs", None), "changes nothing")


def test_what_cannot_be_exported_is_refused(adapter_run, tmp_path):
    run, base, _ = adapter_run
    idle_run = make_adapter_run(tmp_path, MIXTRAL, b_scale=0)
    other_base = export_base(make_adapter_run(tmp_path, SPECS["olmoe"]), tmp_path / "other")
    plain_run = make_run(tmp_path, MIXTRAL)
    for case_run, options, reason in (
        (run, {}, r"in no folder that PEFT could load; .*@0 --to BASE`.* --base BASE .* --merge "),
        (run, {"base": other_base}, "is not the base of the adapter, but differs in model"),
        (run, {"base": tmp_path / "nowhere"}, "nowhere: its config.json cannot be read"),
        (run, {"base": base, "merge": True}, "leave out one of merge and base"),
        (idle_run, {"base": base}, "its adapter changes nothing"),
        (idle_run, {"merge": True}, "its adapter changes nothing"),
        (plain_run, {"merge": True}, "it has no adapter; export it without merge and base"),
    ):
        assert_refused(lambda run=case_run, options=options: Run(run).export(tmp_path / "out", **options), reason)
    assert not (tmp_path / "out").exists()
