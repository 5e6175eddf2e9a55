"""Tests of exported models in transformers.

In the process of the tests, transformers takes the classes that this package registers. `LOAD` runs in a process
without the package, with the copy of the same code in the exported folder.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import cross_entropy

from mhmoe_ray.checkpoint.huggingface.adapters import MhmoeAdapter
from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
from mhmoe_ray.checkpoint.huggingface.names import tensor_entries
from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.trunk import routing_loss
from mhmoe_ray.serving.engine import SamplingParams
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.checkpoint.huggingface.conftest import MODEL_TYPES, MODELS, SEQ_LEN, export_run, make_run, random_model
from tests.checkpoint.huggingface.strategies import model_specs
from tests.serving.asking import answer_tokens

pytestmark = pytest.mark.long

TOKENS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))
PROMPTS = ["fox", "the quick brown fox jumps"]
OWN_KINDS = [kind for kind in MODELS if kind not in MODEL_TYPES]
"""Models that transformers has no class for."""


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """Return the run of a model, its export as a model of transformers, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp(request.param)
    run = make_run(folder, MODELS[request.param])
    export_run(run, folder / "out")
    model, info = AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "out", trust_remote_code=True, padding_side="left")
    return run, model.eval(), tokenizer


def our_model(run):
    return load_model(newest_checkpoint(run, ("weights",))[0])[0]


@torch.no_grad()
def test_logits_are_those_of_training(exported):
    run, model, _ = exported
    our_decoder = our_model(run)
    document_BT = torch.zeros_like(TOKENS) if our_decoder.spec.document_masks else None
    expected = our_decoder(TOKENS, document_BT=document_BT).logits_BTV
    assert expected.std() > 0.3
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(TOKENS, logits_to_keep=3).logits, expected[:, -3:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_generation_is_that_of_the_engine(exported):
    """The KV cache does not change a greedy answer, nor does a batch that is padded at the left."""
    run, model, tokenizer = exported
    answerer = load_answerer(newest_checkpoint(run, ("weights",))[0], ServeSpec(max_concurrency=1))
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "suppress_tokens": [1, 2]}
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert not batch.attention_mask.all()
    answers = model.generate(**batch, **options)[:, -32:]
    assert torch.equal(answers, model.generate(**batch, **options, use_cache=False)[:, -32:])
    for row, prompt in enumerate(PROMPTS):
        inputs = tokenizer(prompt, return_tensors="pt")
        assert inputs.input_ids[0].tolist() == answerer.encode(prompt)
        assert torch.equal(model.generate(**inputs, **options)[0, -32:], answers[row])
        biases = {1: -100.0, 2: -100.0}
        params = SamplingParams(max_tokens=32, temperature=0, logit_bias=biases)
        assert answer_tokens(answerer.engine, answerer.encode(prompt), params) == answers[row].tolist()
        single_logits = model(**inputs).logits[0, -1]
        torch.testing.assert_close(model(**batch).logits[row, -1], single_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("exported", [kind for kind in OWN_KINDS if MODELS[kind].moe], indirect=True)
def test_losses_are_those_of_training(exported):
    """The load balancing loss and the router z-loss come with `output_router_logits`; padding does not count."""
    run, model, _ = exported
    our_decoder = our_model(run)
    moe = our_decoder.spec.moe
    output = model(TOKENS, labels=TOKENS)
    expected = cross_entropy(output.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    routing = our_decoder.eval()(TOKENS).routing
    output = model(TOKENS, labels=TOKENS, output_router_logits=True)
    torch.testing.assert_close(output.loss - expected, routing_loss(our_decoder.spec, routing), rtol=1e-4, atol=1e-6)
    assert len(output.router_logits) == moe.heads * our_decoder.spec.moe_layers
    assert {tuple(logits.shape) for logits in output.router_logits} == {(TOKENS.numel(), moe.experts)}
    padded_tokens = torch.cat((torch.full((2, 5), 7), TOKENS), dim=1)
    mask = torch.cat((torch.zeros(2, 5, dtype=torch.long), torch.ones_like(TOKENS)), dim=1)
    padded_output = model(padded_tokens, attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(padded_output.aux_loss, output.aux_loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exported", OWN_KINDS, indirect=True)
def test_every_parameter_gets_a_gradient_with_checkpointing_too(exported):
    _, model, _ = exported
    gradients = []
    for use_checkpointing in (False, True):
        if use_checkpointing:
            model.activation_checkpointing_enable()
        # The model has no dropout, so training mode changes only checkpointing.
        model.train().zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    model.activation_checkpointing_disable()
    model.eval()
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@settings(max_examples=25)
@given(model_specs())
def test_any_model_computes_the_same_in_transformers(spec):
    from mhmoe_ray.checkpoint.huggingface.configuration_mhmoe import MhmoeConfig
    from mhmoe_ray.checkpoint.huggingface.modeling_mhmoe import MhmoeForCausalLM

    our_decoder = random_model(spec)
    fields = MhmoeAdapter.from_model(spec, 16).model_dump(exclude_unset=True)
    hf_model = MhmoeForCausalLM(MhmoeConfig(**fields)).eval()
    tensors = our_decoder.named_tensors()
    state = {
        name: part
        for group in tensor_entries(spec)
        for entry in group
        for name, part in entry.split(tensors[entry.checkpoint_name]).items()
    }
    missing_names, unexpected_names = hf_model.load_state_dict(state, strict=False)
    assert not unexpected_names
    assert set(missing_names) <= ({"lm_head.weight"} if spec.tied_embeddings else set())
    tokens = torch.randint(spec.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = our_decoder(tokens).logits_BTV
        # If two experts have nearly equal scores, the two models may choose different experts.
        if _smallest_margin(our_decoder, tokens) > 1e-5:
            torch.testing.assert_close(hf_model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def _smallest_margin(model: Decoder, tokens: torch.Tensor) -> float:
    """Return the smallest difference between the router's scores of the last chosen expert and of the next best one."""
    margins = [1.0]
    moe = model.spec.moe
    if moe is None or moe.top_k == moe.experts:
        return 1.0

    def record(router, args, routing):
        score_NE = router.scores(args[0]).softmax(-1)
        best_values = (score_NE + router.bias_E if moe.bias_rate else score_NE).topk(moe.top_k + 1, dim=-1).values
        margins.append(float((best_values[:, -2] - best_values[:, -1]).min()))

    handles = [layer.router.register_forward_hook(record) for layer in model.moe_layers()]
    model(tokens)
    for handle in handles:
        handle.remove()
    return min(margins)


def test_folder_saved_by_transformers_can_be_imported(tmp_path, exported):
    run, model, tokenizer = exported
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    imported_run = import_folder(tmp_path / "theirs", "back", tmp_path / "runs", None)
    manifest = newest_checkpoint(imported_run, ("weights",))[1]
    assert manifest.model == newest_checkpoint(run, ("weights",))[1].model
    our_decoder, hf_model = (our_model(r).named_tensors() for r in (run, imported_run))
    assert all(torch.equal(our_decoder[name], hf_model[name]) for name in our_decoder)


LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
assert "mhmoe_ray" not in sys.modules
AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(tokenizer.decode(model.generate(**tokenizer("the fox", return_tensors="pt"), max_new_tokens=4)[0]))
assert not [name for name in sys.modules if name.split(".")[0] in ("mhmoe_ray", "mhmoe_kernels", "ray")]
"""
REGISTERED = """
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    model = auto_class.from_pretrained(sys.argv[1])
    assert type(model).__module__ == "mhmoe_ray.checkpoint.huggingface.modeling_mhmoe", type(model)
"""
IMPORT_AFTER = "from transformers import AutoModel, AutoModelForSequenceClassification; import mhmoe_ray" + REGISTERED
IMPORT_BEFORE = (
    """
import sys, mhmoe_ray
assert not {"torch", "transformers"} & sys.modules.keys()
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
"""
    + REGISTERED
)
IMPORT_OWN_MODULE = (
    """
import sys, mhmoe_ray.checkpoint.huggingface.modeling_mhmoe
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
"""
    + REGISTERED
)


@pytest.fixture(scope="module")
def exported_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    # The tokenizer has fewer tokens than the model's vocabulary.
    export_run(make_run(folder, MODELS["llama"].model_copy(update={"vocab_size": 1000})), folder / "out")
    return folder / "out"


def run_script(script, *args, tmp_path, **options):
    """Run Python code in a new process without input, with a cache of its own for the code of models."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *map(str, args)]
    options = {"cwd": tmp_path, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(command, check=True, env=environment, **options)


def test_export_needs_only_torch_and_transformers(exported_folder, tmp_path):
    """A process loads the export without the package; once it imports the package, it uses the package's classes."""
    run_script(LOAD + IMPORT_AFTER, exported_folder, tmp_path=tmp_path)


@pytest.mark.parametrize(
    "script",
    [pytest.param(IMPORT_BEFORE, id="package", marks=pytest.mark.slow), pytest.param(IMPORT_OWN_MODULE, id="module")],
)
def test_package_registers_the_model_before_transformers_is_imported(exported_folder, tmp_path, script):
    run_script(script, exported_folder, tmp_path=tmp_path)


def test_exported_folder_describes_itself(exported_folder):
    config = json.loads((exported_folder / "config.json").read_text())
    assert config["architectures"] == ["MhmoeForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_mhmoe.MhmoeForCausalLM"
    generation = json.loads((exported_folder / "generation_config.json").read_text())
    unused_rows = generation.pop("suppress_tokens")
    assert unused_rows == list(range(config["tokenizer_size"], 1000))
    assert generation == {"bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": 2}
    card = (exported_folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| training | step 7, 448 tokens |" in card
    assert f"| context length | {SEQ_LEN} tokens |" in card


@pytest.fixture(scope="module")
def card_process(exported_folder, tmp_path_factory):
    """Return the finished process of the model card's example, which runs in the exported folder."""
    example = (exported_folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    options = {"cwd": exported_folder, "capture_output": True, "text": True}
    return run_script(example, tmp_path=tmp_path_factory.mktemp("card"), **options)


def test_example_of_the_model_card_answers(card_process):
    assert card_process.stdout.splitlines()[-1].startswith("<s> Once upon a time")


def test_example_of_the_model_card_asks_nothing(card_process):
    assert "trust_remote_code" not in card_process.stdout + card_process.stderr


def test_example_of_the_model_card_loads_without_a_warning(card_process):
    assert "[transformers]" not in card_process.stderr


def small_config(**options):
    """Return a configuration that is made in code, without any exported folder."""
    from mhmoe_ray.checkpoint.huggingface.configuration_mhmoe import MhmoeConfig

    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MhmoeConfig(**sizes, num_experts=4, moe_intermediate_size=24, moe_heads=2, **options)


def small_model(name, **options):
    """Return a model of a class of modeling_mhmoe with random weights."""
    from mhmoe_ray.checkpoint.huggingface import modeling_mhmoe

    torch.manual_seed(0)
    return getattr(modeling_mhmoe, name)(small_config(**options)).eval()


@torch.no_grad()
def test_eager_attention_returns_its_weights():
    model = small_model("MhmoeForCausalLM")
    expected_logits = model(TOKENS).logits
    model.set_attn_implementation("eager")
    output = model(TOKENS, output_attentions=True)
    torch.testing.assert_close(output.logits, expected_logits, rtol=0, atol=1e-5)
    assert len(output.attentions) == 2
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 40))
        assert not weights.triu(1).any()


def test_speculative_generation_returns_attentions():
    model = small_model("MhmoeForCausalLM")
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": 4, "do_sample": False, "prompt_lookup_num_tokens": 2, "return_dict_in_generate": True}
    output = model.generate(TOKENS[:1], output_attentions=True, **options)
    assert [step[0].shape[-1] for step in output.attentions] == [40, 41, 42, 43]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("MhmoeModel", "hidden_states"),
        ("MhmoeForCausalLM", "hidden_states"),
        ("MhmoeForSequenceClassification", "hidden_states"),
        ("MhmoeModel", "router_logits"),
        ("MhmoeForCausalLM", "router_logits"),
    ],
)
@torch.no_grad()
def test_configuration_decides_about_outputs_unless_the_call_does(name, field):
    option = f"output_{field}"
    model = small_model(name, pad_token_id=0)
    assert getattr(model(TOKENS), field) is None
    expected = model(TOKENS, **{option: True})[field]
    setattr(model.config, option, True)
    for tensor, expected_tensor in zip(model(TOKENS)[field], expected, strict=True):
        assert torch.equal(tensor, expected_tensor)
    assert getattr(model(TOKENS, **{option: False}), field) is None


@torch.no_grad()
def test_hidden_states_begin_with_the_embeddings_and_end_with_the_output():
    model = small_model("MhmoeModel")
    output = model(TOKENS, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.embed_tokens(TOKENS))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_special_tokens_of_a_configuration_reach_generation():
    unset = small_config()
    assert (unset.bos_token_id, unset.eos_token_id, unset.pad_token_id) == (None, None, None)
    greedy_tokens = small_model("MhmoeForCausalLM").generate(TOKENS[:1], max_new_tokens=8, do_sample=False)[0, 40:]
    end = greedy_tokens[0].item()
    model = small_model("MhmoeForCausalLM", bos_token_id=5, eos_token_id=[end, 7], pad_token_id=7)
    assert model.generate(TOKENS[:1], max_new_tokens=8, do_sample=False)[0, 40:].tolist() == [end]
    assert model.generate(max_new_tokens=1)[0, 0] == 5


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_reward_model_scores_the_last_token_that_is_no_padding(exported_folder, padding_side):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(exported_folder, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported_folder)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=padding_side)
    output = model(**batch, labels=torch.tensor([0.0, 1.0]))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for prompt, score in zip(PROMPTS, output.logits, strict=True):
        states = model.model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(score, model.score(states[0, -1]), rtol=0, atol=1e-5)
