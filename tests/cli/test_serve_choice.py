"""Tests of how `mhmoe serve deploy` reads its arguments: the run, the checkpoint, the settings and the API keys."""

import pytest

from mhmoe_ray.api.serve_target import resolve_target, with_environment_keys
from mhmoe_ray.checkpoint.manifest import committed_checkpoints
from mhmoe_ray.cli.serve import option_overrides
from mhmoe_ray.errors import CheckpointError, RunError, SpecError
from mhmoe_ray.spec import ServeSpec, dump_spec
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run


@pytest.fixture
def run(tmp_path):
    """Return a finished run with one checkpoint, stored below `tmp_path`/runs."""
    return make_run(tmp_path, MIXTRAL)


def test_target_is_a_run_a_checkpoint_or_a_spec(tmp_path, run):
    [checkpoint] = committed_checkpoints(run)
    storage = str(tmp_path / "runs")
    id_target = resolve_target(run.id, None, storage)
    folder_target = resolve_target(str(checkpoint), None, storage, ["serve.port=9000"])
    assert (id_target[0].id, id_target[1]) == (folder_target[0].id, folder_target[1]) == (run.id, checkpoint)
    assert folder_target[2].serve.port == 9000
    spec = run.spec().model_copy(update={"serve": ServeSpec(max_tokens=77)})
    file = tmp_path / "own.yaml"
    file.write_text(dump_spec(spec))
    found_run, path, deploy_spec = resolve_target(str(file), None, None, ["serve.replicas=2"])
    assert (found_run.id, path) == (run.id, checkpoint)
    assert (deploy_spec.serve.max_tokens, deploy_spec.serve.replicas.max) == (77, 2)
    assert resolve_target(spec, None, None, ["serve.replicas=2"]) == (found_run, path, deploy_spec)
    other_spec = spec.model_copy(update={"name": "another"})
    file.write_text(dump_spec(other_spec))
    for target in (str(file), other_spec):
        with pytest.raises(RunError, match="holds no run of it"):
            resolve_target(target, None, None)
    with pytest.raises(RunError, match="elsewhere holds no run of it"):
        resolve_target(spec, None, "elsewhere")


def test_target_spec_may_name_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own.yaml"
    file.write_text("{name: own, preset: mhmoe, data: {sources: {web: {path: raw}}, prepared: prepared}}")
    with pytest.raises(RunError, match=f"{tmp_path}/runs holds no run of it"):
        resolve_target(str(file), None, None)


def test_damaged_checkpoint_is_not_served(tmp_path, run):
    [checkpoint] = committed_checkpoints(run)
    next((checkpoint / "weights").iterdir()).write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 0 bytes"):
        resolve_target(str(checkpoint), None, str(tmp_path / "runs"))


def test_replica_and_engine_options_become_overrides():
    assert option_overrides(None, None) == []
    assert option_overrides("3", None) == ["serve.replicas=3"]
    assert option_overrides("1..4", "vllm") == ["serve.replicas={min: 1, max: 4}", "serve.engine=vllm"]


def test_api_keys_of_the_environment_become_hashes(monkeypatch):
    monkeypatch.setenv("MHMOE_API_KEYS", "ann:secret,bob:other")
    keys = with_environment_keys(ServeSpec()).keys
    assert [key.name for key in keys] == ["ann", "bob"]
    assert keys[0].sha256 == "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
    monkeypatch.setenv("MHMOE_API_KEYS", " ann:secret, bob : other\n,")
    assert with_environment_keys(ServeSpec()).keys == keys, "space around names and keys belongs to neither"


@pytest.mark.parametrize(
    ("key_list", "message"),
    [
        ("secret", "it is not NAME:KEY"),
        ("ann: ", "it is not NAME:KEY"),
        ("s3cret!:ann", "a name has up to 40 letters"),
        (f"{'a' * 41}:secret", "a name has up to 40 letters"),
        ("ann:sécret", "a key has a character that is not printable ASCII"),
        ("ann:ключ", "a key has a character that is not printable ASCII"),
        ("ann:sec\nret", "a key has a character that is not printable ASCII"),
    ],
)
def test_malformed_keys_are_one_line_that_shows_no_secret(key_list, message, monkeypatch):
    monkeypatch.setenv("MHMOE_API_KEYS", f"bob:other,{key_list}")
    with pytest.raises(SpecError, match=f"^MHMOE_API_KEYS: {message}") as exc_info:
        with_environment_keys(ServeSpec())
    assert not any(secret in str(exc_info.value) for secret in ("sec", "s3cret", "sécret", "ключ", "other"))
