"""Tests of imports of Hugging Face folders: settings that are imported, and folders that are rejected."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhmoe_ray.checkpoint.huggingface.compare import compare_weights, open_model
from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.errors import CheckpointError, MhmoeError, SpecError
from mhmoe_ray.serving.engine import SamplingParams
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.checkpoint.huggingface.conftest import MIXTRAL, MODELS, edit_config, export_run, make_run, raise_read_error
from tests.serving.asking import answer_tokens
from tests.support.llama_tokenizer import llama_tokenizer


def edit_tensors(edit):
    """Return a function that loads the tensors of a folder, calls `edit` with them, and writes them back."""

    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def rename_to_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remove_shard(folder):
    """Replace the weights of a folder by an index that names a missing file."""
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def write_chat_templates(templates):
    """Return a function that writes these chat templates to the tokenizer_config.json of a folder."""
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))


GATE = "model.layers.1.block_sparse_moe.gate.weight"
QUERIES = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (edit_config(head_dim=7), "d_head is 7, but rotary positions need an even width"),
        (edit_config(rope_parameters={"rope_type": "dynamic", "factor": 2}), r"positions are scaled \(dynamic\)"),
        (edit_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (edit_config(rope_parameters={"rope_type": "yarn", "factor": 4, "mscale": 0.7}), "mscale is 0.7"),
        (edit_config(rope_parameters={"rope_type": "yarn"}), "factor: Field required"),
        (edit_config(rope_parameters=3), "rope_parameters: Input should be a valid dictionary"),
        (edit_config(attention_bias=True), "attention_bias is True, which is not a key of a mixtral"),
        (edit_config(attention_multiplier=2.0), "attention_multiplier is 2.0, which is not a key of a mixtral"),
        (edit_config(hidden_act="gelu"), "hidden_act: Input should be 'silu'"),
        (edit_config(model_type="gpt2"), "model_type is gpt2; import one of llama, mistral, qwen2, qwen3, mixtral"),
        (edit_config(model_type="llama"), "num_experts_per_tok is 2, which is not a key of a llama"),
        (edit_config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
        (edit_config(num_experts_per_tok=1), "with top_k 1, normalize_gates makes every gate 1"),
        (edit_config(num_experts_per_tok=9), "top_k is 9"),
        (edit_config(hidden_size="wide"), "hidden_size: Input should be a valid integer"),
        (edit_config(num_local_experts=3), r"experts\.3\.w\d\.weight does not belong to such a model \(and \d+ more"),
        (edit_config(num_hidden_layers=10**12), "num_hidden_layers: Input should be less than or equal to 10000"),
        (edit_config(num_hidden_layers=10_000), r"it has \d+ tensors for 10,000 layers and"),
        (edit_config(num_hidden_layers=4), r"model\.layers\.3\.\S+ is missing \(and \d+ more"),
        (edit_config(intermediate_size=40), r"w1\.weight has shape \(48, 32\), not \(40, 32\)"),
        (edit_config(vocab_size=280), r"it has \d+ entries; use one of at most model.vocab_size \(280\)"),
        (
            edit_config(eos_token_id=[2, 320]),
            r"eos_token_id in its config\.json is \[2, 320\], and its tokenizer has tokens 0",
        ),
        (edit_config(eos_token_id="</s>"), r"eos_token_id in its config\.json is </s>, and"),
        (edit_config(eos_token_id=True), r"eos_token_id in its config\.json is True, and"),
        (
            lambda f: (f / "generation_config.json").write_text("["),
            r"generation_config\.json cannot be read \(Expecting",
        ),
        (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": -1}'), r"generation_config\.json is -1"),
        (edit_tensors(lambda t: t.pop(GATE)), f"{GATE} is missing; "),
        (edit_tensors(lambda t: t.update(x=torch.ones(1))), "x does not belong to such a model; "),
        (edit_tensors(lambda t: t.update({GATE: t[GATE].to(torch.int8)})), "stored as I8"),
        (
            edit_tensors(lambda t: t.update({QUERIES: t[QUERIES].half()})),
            "and its like differ in dtype",
        ),
        (rename_to_pickle, r"pytorch_model\.bin\) are pickles"),
        (remove_shard, "model-00001-of-00002.safetensors cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "is damaged or no safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("["), "config.json is damaged"),
        (lambda f: (f / "tokenizer_config.json").write_text("["), r"tokenizer_config\.json cannot be read \(Expecting"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), r"tokenizer_config\.json cannot be read \(it is no"),
        (
            lambda f: (f / "tokenizer_config.json").write_bytes(b"\xff"),
            r"tokenizer_config\.json cannot be read \('utf-8'",
        ),
        (
            write_chat_templates([{"name": "tool_use", "template": "x"}]),
            r"no text, nor a list with one that is named default; put the one to use into chat_template\.jinja",
        ),
        (write_chat_templates(["x", {"template": "y"}]), "the chat_template in its tokenizer_config"),
        (write_chat_templates([{"name": "default", "template": 3}]), "the chat_template in its tokenizer_config"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), r"chat_template\.jinja cannot be read \('utf-8'"),
    ],
)
def test_invalid_folder_is_rejected(tmp_path, mixtral_folder, spoil, reason):
    spoil(mixtral_folder)
    with pytest.raises(MhmoeError, match=reason) as raised:
        import_folder(mixtral_folder, None, tmp_path / "runs", None)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_tensors_that_models_do_not_need_are_ignored(tmp_path):
    """Some programs store the frequencies of rotary embeddings, and a tied output beside the embedding."""
    folder = tmp_path / "folder"
    export_run(make_run(tmp_path, MODELS["llama"]), folder)
    shards = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for file in (*shards, folder / "model.safetensors.index.json"):
        file.unlink()
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors, folder / "model.safetensors")
    run = import_folder(folder, None, tmp_path / "runs", None)
    with open_model(folder) as a, open_model(newest_checkpoint(run)[0]) as b:
        assert compare_weights(a, b) == []
    edit_tensors(lambda t: t["lm_head.weight"].add_(1))(folder)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight does not belong to such a model; "):
        import_folder(folder, None, tmp_path / "runs", None)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_tokens_of_a_folder_survive_a_round_trip(tmp_path, mixtral_folder, file):
    def answer(run):
        answerer = load_answerer(newest_checkpoint(run, ("weights",))[0], ServeSpec(max_concurrency=1))
        return answer_tokens(
            answerer.engine, answerer.encode("the quick brown"), SamplingParams(max_tokens=24, temperature=0)
        )

    plain_run = import_folder(mixtral_folder, None, tmp_path / "runs", None)
    assert newest_checkpoint(plain_run)[1].ends == []
    full_answer = answer(plain_run)
    end_token = full_answer[5]
    (mixtral_folder / "generation_config.json").unlink()
    fields = json.loads((mixtral_folder / file).read_text()) if file == "config.json" else {}
    (mixtral_folder / file).write_text(json.dumps({**fields, "eos_token_id": [2, end_token]}))
    first_run = import_folder(mixtral_folder, None, tmp_path / "runs", None)
    export_run(first_run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [1, 2, end_token]
    second_run = import_folder(tmp_path / "out", None, tmp_path / "runs", None)
    for run in (first_run, second_run):
        assert newest_checkpoint(run)[1].ends == [end_token]
        assert answer(run) == full_answer[: full_answer.index(end_token)]


def test_end_token_may_be_a_number(tmp_path, mixtral_folder):
    edit_config(eos_token_id=7)(mixtral_folder)
    assert newest_checkpoint(import_folder(mixtral_folder, None, tmp_path / "runs", None))[1].ends == [7]
    edit_config(eos_token_id=None)(mixtral_folder)
    assert newest_checkpoint(import_folder(mixtral_folder, None, tmp_path / "runs", None))[1].ends == []


def test_default_chat_template_is_taken(tmp_path, mixtral_folder):
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_chat_templates(templates)(mixtral_folder)
    run = import_folder(mixtral_folder, None, tmp_path / "runs", None)
    assert run.chat_template_file.read_text() == "plain"


@pytest.mark.parametrize("step", ["events.record", "mark_imported"])
def test_failed_import_leaves_nothing(tmp_path, mixtral_folder, monkeypatch, step):
    def raise_no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"mhmoe_ray.checkpoint.huggingface.import_.{step}", raise_no_space)
    with pytest.raises(SpecError, match="No space left on device; make room there"):
        import_folder(mixtral_folder, None, tmp_path / "runs", None)
    assert not list((tmp_path / "runs").iterdir())


def test_read_failure_is_not_reported_as_full_storage(tmp_path, mixtral_folder, monkeypatch):
    monkeypatch.setattr("mhmoe_ray.checkpoint.huggingface.files.StoredTensors.read", raise_read_error)
    message = f"^folder {mixtral_folder}: it cannot be read: Input/output error; repair its disk"
    with pytest.raises(CheckpointError, match=message):
        import_folder(mixtral_folder, None, tmp_path / "runs", None)
    assert not list((tmp_path / "runs").iterdir())


def test_sliding_window_limits_the_sequence_length(tmp_path, mixtral_folder):
    edit_config(sliding_window=16)(mixtral_folder)
    run = import_folder(mixtral_folder, None, tmp_path / "runs", None)
    assert newest_checkpoint(run)[1].seq_len == 16
    with pytest.raises(
        CheckpointError, match="made for 16 tokens at once; choose a sequence length up to that, not 17"
    ):
        import_folder(mixtral_folder, None, tmp_path / "runs", 17)


def test_contradictory_config_is_rejected(tmp_path):
    export_run(make_run(tmp_path, MIXTRAL), tmp_path / "out")
    edit_config(rms_norm_eps=1e-6)(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"section mhmoe of its config\.json is not the model that the other"):
        import_folder(tmp_path / "out", None, tmp_path / "runs", None)


def test_folder_with_another_tokenizer_is_rejected(tmp_path):
    export_run(make_run(tmp_path, MODELS["dense"]), tmp_path / "out")
    tokenizer = tmp_path / "out" / "tokenizer.json"
    # The file now differs, but it contains the same tokenizer, so the import accepts it.
    tokenizer.write_text(tokenizer.read_text() + "\n")
    import_folder(tmp_path / "out", "same", tmp_path / "runs", None)
    llama_tokenizer(["quite other words are in this text"] * 4, 320).save(str(tokenizer))
    with pytest.raises(CheckpointError, match=r"its tokenizer\.json is not the one the model was trained with"):
        import_folder(tmp_path / "out", None, tmp_path / "runs", None)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "half\ud800.safetensors", ""])
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    folder = tmp_path / "folder"
    export_run(make_run(tmp_path, MODELS["llama"]), folder)
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match="names files that cannot be in it"):
        import_folder(folder, None, tmp_path / "runs", None)
