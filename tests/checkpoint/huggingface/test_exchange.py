"""Round trips between runs and exported folders, and comparisons with transformers as the oracle."""

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
from mhmoe_ray.serve.engine import Sampling
from mhmoe_ray.serve.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import describe_file
from tests.checkpoint.huggingface.conftest import (
    MIXTRAL,
    MODELS,
    SEQ_LEN,
    exported,
    make_run,
    random_model,
    save_mixtral,
    unreadable,
)
from tests.paged import in_parts
from tests.ranks import run_ranks
from tests.serve.asking import pieces, tokens

TOKENS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))


def tensors_of(folder):
    return {p.name: load_file(p) for p in sorted(folder.glob("*.safetensors"))}


@torch.no_grad()
def our_logits(run: RunDir) -> torch.Tensor:
    model, _ = load_model(newest_checkpoint(run, ("weights",))[0])
    return in_parts(model, TOKENS, [TOKENS.shape[1]])  # as serving does


@torch.no_grad()
def their_logits(model) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("kind", MODELS)
def test_export_import_export_is_the_same_to_the_bit(tmp_path, kind):
    first = make_run(tmp_path, MODELS[kind])
    first.chat_template_file.write_text("{{ messages[0].content }}\n")
    done = exported(first, tmp_path / "one")
    second = import_folder(tmp_path / "one", "again", tmp_path / "runs", None)
    exported(second, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    before, after = (newest_checkpoint(run, ("weights",))[1] for run in (first, second))
    assert (after.model, after.seq_len) == (before.model, SEQ_LEN)
    assert after.tokenizer_sha256 == describe_file(tmp_path / "one" / "tokenizer.json").sha256
    assert torch.equal(our_logits(first), our_logits(second))
    files = tensors_of(tmp_path / "one")
    assert len(files) == 1 + MODELS[kind].layers
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    total = sum(t.nbytes for tensors in files.values() for t in tensors.values())
    assert index["metadata"]["total_size"] == done.bytes == total
    assert done.tensors == len(index["weight_map"])
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == first.chat_template_file.read_text()
    assert done.model_type == ("mixtral" if kind == "mixtral" else "mhmoe")


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_mixtrals_shape_loads_in_transformers_as_it_lies(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    run = make_run(tmp_path, MIXTRAL.model_copy(update={"tied_embeddings": tied}))
    exported(run, tmp_path / "out")
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loaded[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.max_position_embeddings == SEQ_LEN
    assert model.config.eos_token_id == [1, 2]
    assert model.dtype == torch.float32
    torch.testing.assert_close(our_logits(run), their_logits(model.eval()), rtol=0, atol=1e-4)


def test_what_transformers_saves_of_an_export_comes_back(tmp_path):
    """A folder that transformers saves from an export can be imported.

    The new config.json holds both our section and the fields of transformers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = make_run(tmp_path, MIXTRAL)
    exported(run, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    again = import_folder(tmp_path / "theirs", None, tmp_path / "runs", None)
    manifest = newest_checkpoint(again, ("weights",))[1]
    assert manifest.model == MIXTRAL
    assert torch.equal(our_logits(run), our_logits(again))


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_a_mixtral_of_transformers_computes_the_same_here(tmp_path, mixtral, shard):
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


def test_the_engine_answers_as_transformers_does(tmp_path, mixtral, mixtral_folder):
    run = import_folder(mixtral_folder, None, tmp_path / "runs", None)
    answerer = load_answerer(newest_checkpoint(run, ("weights",))[0], ServeSpec(max_concurrency=1))
    for prompt in ("the quick brown", "", "fox 日本 🦊"):
        ids = answerer.encode(prompt)
        assert ids[0] == 1
        answer = tokens(answerer.engine, ids, Sampling(24, temperature=0))
        known = answerer.tokenizer.get_vocab_size()
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": [1, 2], "pad_token_id": 0}
        options |= {"suppress_tokens": list(range(known, 320))}
        theirs = mixtral.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
        expected = theirs[0, len(ids) :].tolist()
        assert answer == [token for token in expected if token not in (1, 2)]
        assert len(set(answer)) > 3
        found = pieces(answerer, ids, Sampling(24, temperature=0))
        whole = answerer.tokenizer.decode([*ids, *answer])
        if "\ufffd" not in whole:
            assert prompt + "".join(p.text for p in found) == whole


def test_bfloat16_stays_bfloat16_on_disk(tmp_path, mixtral):
    from transformers import AutoModelForCausalLM

    folder = save_mixtral(copy.deepcopy(mixtral).to(torch.bfloat16), tmp_path / "half")
    run = import_folder(folder, "half", tmp_path / "runs", None)
    weights = newest_checkpoint(run, ("weights",))[0] / "weights"
    stored = [t for tensors in tensors_of(weights).values() for t in tensors.values()]
    assert {t.dtype for t in stored} == {torch.bfloat16}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(our_logits(run), their_logits(whole), rtol=0, atol=1e-4)
    exported(run, tmp_path / "out")
    theirs = {k: t for tensors in tensors_of(folder).values() for k, t in tensors.items()}
    ours = {k: t for tensors in tensors_of(tmp_path / "out").values() for k, t in tensors.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def _load_spread(checkpoint):
    """Return the tensors that one of two ranks, each with half of the experts, holds after loading the weights."""
    import torch.distributed as dist

    mesh, spec = init_device_mesh("cpu", (2,)), read_manifest(checkpoint).model
    half = spec.moe.experts // 2
    model = Decoder(spec, range(half * dist.get_rank(), half * (dist.get_rank() + 1)))
    into = {
        name: DTensor.from_local(t, mesh, [Shard(0)]) if ".experts." in name else t
        for name, t in model.tensors().items()
    }
    load_tensors(checkpoint / "weights", into)
    return model.tensors()


@pytest.mark.slow
def test_imported_weights_load_where_experts_are_spread(tmp_path, mixtral_folder):
    run = import_folder(mixtral_folder, None, tmp_path / "runs", None)
    checkpoint = newest_checkpoint(run, ("weights",))[0]
    whole = load_model(checkpoint)[0].tensors()
    first, second = run_ranks(2, _load_spread, checkpoint)
    for name, tensor in whole.items():
        halves = torch.cat([first[name], second[name]]) if ".experts." in name else first[name]
        assert torch.equal(halves, tensor), name


def test_an_imported_run_is_a_run(tmp_path, mixtral_folder):
    run = import_folder(mixtral_folder, "mine", tmp_path / "runs", 32)
    assert find_run(None, tmp_path / "runs") == run
    assert events.state(events.events(run)) == "imported"
    assert run.is_imported
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert not run.spec_file.exists()
    assert newest_checkpoint(run)[1].seq_len == 32


@pytest.mark.parametrize("what", ["load_tensors", "index_of"])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_folder_that_cannot_be_written(tmp_path, monkeypatch, what):
    run = make_run(tmp_path, MODELS["dense"])
    monkeypatch.setattr(f"mhmoe_ray.checkpoint.huggingface.export.{what}", unreadable)
    with pytest.raises(
        CheckpointError, match=r"^checkpoint \S+step_00000007\.1: it cannot be read: Input/output error; "
    ):
        exported(run, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}


def test_an_export_reads_the_header_of_a_file_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        "mhmoe_ray.checkpoint.load.stored_slices", lambda file: read.append(file) or stored_slices(file)
    )
    exported(make_run(tmp_path, MIXTRAL), tmp_path / "out")
    assert len(read) == 1


def test_an_export_never_writes_into_what_is_there(tmp_path):
    run = make_run(tmp_path, MODELS["dense"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="it is not empty"):
        exported(run, tmp_path / "full")
    with pytest.raises(CheckpointError, match="name a folder you can write"):
        exported(run, tmp_path / "full" / "x" / "y")
    (tmp_path / "empty").mkdir()
    exported(run, tmp_path / "empty")
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "full", "empty"}


def test_an_export_that_fails_leaves_nothing(tmp_path):
    run = make_run(tmp_path, MODELS["dense"])
    checkpoint, manifest, _ = newest_checkpoint(run, ("weights",))
    deeper = manifest.model_copy(update={"model": manifest.model.model_copy(update={"layers": 3})})
    with pytest.raises(CheckpointError, match=r"blocks\.2\.\S+ is not in it"):
        export(checkpoint, deeper, tmp_path / "out")
    shutil.rmtree(run.path)
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}


def test_random_models_are_all_different_inside():
    """Assert what the round-trip tests rely on: no two tensors of one shape in a random model are equal."""
    tensors = list(random_model(MODELS["xmoe"]).tensors().values())
    for i, a in enumerate(tensors):
        assert not any(a.shape == b.shape and torch.equal(a, b) for b in tensors[:i])
