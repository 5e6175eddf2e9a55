"""The meaning of the arguments of `mhmoe serve deploy`."""

import pytest

from mhmoe_ray.checkpoint.manifest import committed
from mhmoe_ray.cli.serve_choice import chosen, sizes_set, with_keys
from mhmoe_ray.errors import CheckpointError, RunError, SpecError
from mhmoe_ray.spec import ServeSpec, dump_spec
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, MIXTRAL)


def test_a_run_by_id_a_checkpoint_by_folder_and_a_spec_by_its_newest_run(tmp_path, run):
    [checkpoint] = committed(run)
    storage = str(tmp_path / "runs")
    by_id = chosen(run.id, None, storage, [])
    by_folder = chosen(str(checkpoint), None, storage, ["serve.port=9000"])
    assert (by_id[0].id, by_id[1]) == (by_folder[0].id, by_folder[1]) == (run.id, checkpoint)
    assert by_folder[2].serve.port == 9000
    spec = run.spec().model_copy(update={"serve": ServeSpec(max_tokens=77)})
    file = tmp_path / "own.yaml"
    file.write_text(dump_spec(spec))
    found, path, how = chosen(str(file), None, "elsewhere", ["serve.replicas=2"])
    assert (found.id, path) == (run.id, checkpoint)
    assert (how.serve.max_tokens, how.serve.replicas.max) == (77, 2)
    file.write_text(dump_spec(spec.model_copy(update={"name": "another"})))
    with pytest.raises(RunError, match="holds no run of it"):
        chosen(str(file), None, "elsewhere", [])


def test_a_spec_that_names_a_preset_is_one_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own.yaml"
    file.write_text("{name: own, preset: mhmoe, data: {sources: {web: {path: raw}}, prepared: prepared}}")
    with pytest.raises(RunError, match=f"{tmp_path}/runs holds no run of it"):
        chosen(str(file), None, "elsewhere", [])


def test_a_damaged_checkpoint_is_not_served(tmp_path, run):
    [checkpoint] = committed(run)
    next((checkpoint / "weights").iterdir()).write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 0 bytes"):
        chosen(str(checkpoint), None, str(tmp_path / "runs"), [])


def test_replicas_are_a_number_or_a_range_and_the_engine_is_named():
    assert sizes_set(None, None) == []
    assert sizes_set("3", None) == ["serve.replicas=3"]
    assert sizes_set("1..4", "vllm") == ["serve.replicas={min: 1, max: 4}", "serve.engine=vllm"]


def test_keys_of_the_environment_are_kept_as_hashes(monkeypatch):
    monkeypatch.setenv("MHMOE_API_KEYS", "ann:secret,bob:other")
    keys = with_keys(ServeSpec()).keys
    assert [key.name for key in keys] == ["ann", "bob"]
    assert keys[0].sha256 == "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
    monkeypatch.setenv("MHMOE_API_KEYS", " ann:secret, bob : other\n,")
    assert with_keys(ServeSpec()).keys == keys, "space around names and keys belongs to neither"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("secret", "it is not NAME:KEY"),
        ("ann: ", "it is not NAME:KEY"),
        ("s3cret!:ann", "a name has up to 40 letters"),
        (f"{'a' * 41}:secret", "a name has up to 40 letters"),
    ],
)
def test_what_is_no_list_of_keys_is_one_line_that_shows_none(given, why, monkeypatch):
    monkeypatch.setenv("MHMOE_API_KEYS", f"bob:other,{given}")
    with pytest.raises(SpecError, match=f"^MHMOE_API_KEYS: {why}") as wrong:
        with_keys(ServeSpec())
    assert not any(secret in str(wrong.value) for secret in ("secret", "s3cret", "other"))
