"""Tests of round trips between runs and exported folders, and comparisons with transformers."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from mhmoe_ray.checkpoint.format import stored_slices
from mhmoe_ray.checkpoint.huggingface.export import export
from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
from mhmoe_ray.checkpoint.load import load_model, load_tensors
from mhmoe_ray.checkpoint.manifest import newest_checkpoint, read_manifest
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir, find_run
from mhmoe_ray.serving.engine import SamplingParams
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import describe_file
from tests.checkpoint.huggingface.conftest import (
    MIXTRAL,
    MODEL_TYPES,
    MODELS,
    SEQ_LEN,
    export_run,
    make_run,
    raise_read_error,
    random_model,
    save_mixtral,
)
from tests.serving.asking import answer_pieces, answer_tokens
from tests.support.paged import logits_in_parts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.long

TOKENS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))


def folder_tensors(folder):
    """Return the tensors of each safetensors file of a folder, by file name and tensor name."""
    return {p.name: load_file(p) for p in sorted(folder.glob("*.safetensors"))}


@torch.no_grad()
def our_logits(run: RunDir) -> torch.Tensor:
    model, _ = load_model(newest_checkpoint(run, ("weights",))[0])
    return logits_in_parts(model, TOKENS, [TOKENS.shape[1]])  # with a KV cache, as in serving


@torch.no_grad()
def their_logits(model) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("kind", MODELS)
def test_export_and_import_round_trip_is_bit_identical(tmp_path, kind):
    first_run = make_run(tmp_path, MODELS[kind])
    first_run.chat_template_file.write_text("{{ messages[0].content }}\n")
    export_result = export_run(first_run, tmp_path / "one")
    second_run = import_folder(tmp_path / "one", "again", tmp_path / "runs", None)
    export_run(second_run, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        # The model card differs, because it names the run and has figures of its training.
        if path.name == "README.md":
            continue
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    first_manifest, second_manifest = (newest_checkpoint(run, ("weights",))[1] for run in (first_run, second_run))
    assert (second_manifest.model, second_manifest.seq_len) == (first_manifest.model, SEQ_LEN)
    assert second_manifest.tokenizer_sha256 == describe_file(tmp_path / "one" / "tokenizer.json").sha256
    assert torch.equal(our_logits(first_run), our_logits(second_run))
    files = folder_tensors(tmp_path / "one")
    assert len(files) == 1 + MODELS[kind].layers
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    total = sum(t.nbytes for tensors in files.values() for t in tensors.values())
    assert index["metadata"]["total_size"] == export_result.bytes == total
    assert export_result.tensors == len(index["weight_map"])
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == first_run.chat_template_file.read_text()
    assert export_result.model_type == MODEL_TYPES.get(kind, "mhmoe")


@pytest.mark.parametrize("tied", [False, True])
def test_mixtral_export_loads_in_transformers(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    run = make_run(tmp_path, MIXTRAL.model_copy(update={"tied_embeddings": tied}))
    export_run(run, tmp_path / "out")
    model, loading_info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.max_position_embeddings == SEQ_LEN
    assert model.config.eos_token_id == [1, 2]
    assert model.dtype == torch.float32
    torch.testing.assert_close(our_logits(run), their_logits(model.eval()), rtol=0, atol=1e-4)


def test_an_export_from_before_sub_tokens_had_a_width_is_imported_as_the_same_model(tmp_path):
    run = make_run(tmp_path, MODELS["all"])
    export_run(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("sub_token_size") is None
    assert config["mhmoe"]["model"]["moe"].pop("d_sub_token") is None
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    imported_run = import_folder(tmp_path / "out", None, tmp_path / "runs", None)
    assert newest_checkpoint(imported_run, ("weights",))[1].model == MODELS["all"]
    assert torch.equal(our_logits(run), our_logits(imported_run))
    del config["mhmoe"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    imported_run = import_folder(tmp_path / "out", None, tmp_path / "runs", None)
    assert newest_checkpoint(imported_run, ("weights",))[1].model.row_width == 16
    assert torch.equal(our_logits(run), our_logits(imported_run))


def test_export_saved_by_transformers_can_be_imported(tmp_path):
    """The config.json that transformers saves has both our section `mhmoe` and the fields of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = make_run(tmp_path, MIXTRAL)
    export_run(run, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    imported_run = import_folder(tmp_path / "theirs", None, tmp_path / "runs", None)
    manifest = newest_checkpoint(imported_run, ("weights",))[1]
    assert manifest.model == MIXTRAL
    assert torch.equal(our_logits(run), our_logits(imported_run))


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_imported_mixtral_has_the_same_logits(tmp_path, mixtral, shard):
    folder = save_mixtral(mixtral, tmp_path / "Mixtral-8x0.1", max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "20KB")
    run = import_folder(folder, None, tmp_path / "runs", None)
    assert run.id.startswith("mixtral-8x0-1-")
    manifest = newest_checkpoint(run, ("weights",))[1]
    assert (manifest.step, manifest.seed, manifest.data_sha256, manifest.seq_len) == (0, None, None, SEQ_LEN)
    expected = their_logits(mixtral)
    assert expected.std() > 0.5
    torch.testing.assert_close(our_logits(run), expected, rtol=0, atol=1e-4)
    moe = manifest.model.moe
    assert (moe.balance_weight * 3 / 2, moe.balance_choices) == (pytest.approx(0.001), "all")


def test_engine_answers_like_transformers(tmp_path, mixtral, mixtral_folder):
    run = import_folder(mixtral_folder, None, tmp_path / "runs", None)
    answerer = load_answerer(newest_checkpoint(run, ("weights",))[0], ServeSpec(max_concurrency=1))
    for prompt in ("the quick brown", "", "fox 日本 🦊"):
        ids = answerer.encode(prompt)
        assert ids[0] == 1
        answer = answer_tokens(answerer.engine, ids, SamplingParams(max_tokens=24, temperature=0))
        vocab_size = answerer.tokenizer.get_vocab_size()
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": [1, 2], "pad_token_id": 0}
        options |= {"suppress_tokens": list(range(vocab_size, 320))}
        generated_tokens = mixtral.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
        expected = generated_tokens[0, len(ids) :].tolist()
        assert answer == [token for token in expected if token not in (1, 2)]
        assert len(set(answer)) > 3
        text_pieces = answer_pieces(answerer, ids, SamplingParams(max_tokens=24, temperature=0))
        full_text = answerer.tokenizer.decode([*ids, *answer])
        if "\ufffd" not in full_text:
            assert prompt + "".join(p.text for p in text_pieces) == full_text


def test_bfloat16_is_kept_on_disk(tmp_path, mixtral):
    from transformers import AutoModelForCausalLM

    folder = save_mixtral(copy.deepcopy(mixtral).to(torch.bfloat16), tmp_path / "half")
    run = import_folder(folder, "half", tmp_path / "runs", None)
    weights = newest_checkpoint(run, ("weights",))[0] / "weights"
    stored = [t for tensors in folder_tensors(weights).values() for t in tensors.values()]
    assert {t.dtype for t in stored} == {torch.bfloat16}
    float32_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(our_logits(run), their_logits(float32_model), rtol=0, atol=1e-4)
    export_run(run, tmp_path / "out")
    original_tensors = {k: t for tensors in folder_tensors(folder).values() for k, t in tensors.items()}
    exported_tensors = {k: t for tensors in folder_tensors(tmp_path / "out").values() for k, t in tensors.items()}
    assert exported_tensors.keys() == original_tensors.keys()
    assert all(torch.equal(exported_tensors[name], original_tensors[name]) for name in exported_tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def _load_on_rank(checkpoint):
    """Load a checkpoint's weights on one of two ranks, which has half of the experts, and return the rank's tensors."""
    import torch.distributed as dist

    mesh, spec = init_device_mesh("cpu", (2,)), read_manifest(checkpoint).model
    half = spec.moe.experts // 2
    model = Decoder(spec, range(half * dist.get_rank(), half * (dist.get_rank() + 1)))
    tensors = {
        name: DTensor.from_local(t, mesh, [Shard(0)]) if ".experts." in name else t
        for name, t in model.named_tensors().items()
    }
    load_tensors(checkpoint / "weights", tensors)
    return model.named_tensors()


@pytest.mark.slow
def test_imported_weights_load_with_sharded_experts(tmp_path, mixtral_folder):
    run = import_folder(mixtral_folder, None, tmp_path / "runs", None)
    checkpoint = newest_checkpoint(run, ("weights",))[0]
    full_tensors = load_model(checkpoint)[0].named_tensors()
    first_rank_tensors, second_rank_tensors = run_ranks(2, _load_on_rank, checkpoint)
    for name, tensor in full_tensors.items():
        joined_tensor = (
            torch.cat([first_rank_tensors[name], second_rank_tensors[name]])
            if ".experts." in name
            else first_rank_tensors[name]
        )
        assert torch.equal(joined_tensor, tensor), name


def test_imported_run_can_be_found(tmp_path, mixtral_folder):
    run = import_folder(mixtral_folder, "mine", tmp_path / "runs", 32)
    assert find_run(None, tmp_path / "runs") == run
    assert events.state(events.read(run)) == "imported"
    assert run.is_imported
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert not run.spec_file.exists()
    assert newest_checkpoint(run)[1].seq_len == 32


@pytest.mark.parametrize("function", ["load_tensors", "read_index"])
def test_read_failure_is_not_reported_as_write_failure(tmp_path, monkeypatch, function):
    run = make_run(tmp_path, MODELS["dense"])
    monkeypatch.setattr(f"mhmoe_ray.checkpoint.load.{function}", raise_read_error)
    with pytest.raises(
        CheckpointError, match=r"^checkpoint \S+step_00000007\.1: it cannot be read: Input/output error; "
    ):
        export_run(run, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}


def test_export_reads_each_header_once(tmp_path, monkeypatch):
    read_files = []
    monkeypatch.setattr(
        "mhmoe_ray.checkpoint.load.stored_slices", lambda file: read_files.append(file) or stored_slices(file)
    )
    export_run(make_run(tmp_path, MIXTRAL), tmp_path / "out")
    assert len(read_files) == 1


def test_export_rejects_existing_files(tmp_path):
    run = make_run(tmp_path, MODELS["dense"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="it is not empty"):
        export_run(run, tmp_path / "full")
    with pytest.raises(CheckpointError, match="name a folder you can write"):
        export_run(run, tmp_path / "full" / "x" / "y")
    (tmp_path / "empty").mkdir()
    export_run(run, tmp_path / "empty")
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "full", "empty"}


def test_failed_export_leaves_nothing(tmp_path):
    run = make_run(tmp_path, MODELS["dense"])
    checkpoint, manifest, _ = newest_checkpoint(run, ("weights",))
    deeper_manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update={"layers": 3})})
    with pytest.raises(CheckpointError, match=r"blocks\.2\.\S+ is not in it"):
        export(checkpoint, deeper_manifest, tmp_path / "out")
    shutil.rmtree(run.path)
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}


def test_random_models_have_no_equal_tensors():
    """The round-trip tests rely on this: no two tensors of one shape in a random model are equal."""
    tensors = list(random_model(MODELS["xmoe"]).named_tensors().values())
    for i, a in enumerate(tensors):
        assert not any(a.shape == b.shape and torch.equal(a, b) for b in tensors[:i])
