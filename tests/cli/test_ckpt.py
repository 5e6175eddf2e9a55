"""Exports and imports of checkpoints on the command line, without a cluster."""

import json
import shutil
import subprocess

import pytest

from mhmoe_ray import storage
from mhmoe_ray.checkpoint.retention import drop
from mhmoe_ray.cli.ckpt import verify
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import Result, assert_one_line, command, mhmoe


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Export a trained run to out/ and import it again; return the folder, the run, and the id of the imported run."""
    folder = tmp_path_factory.mktemp("project")
    run = make_run(folder, MIXTRAL)
    done = mhmoe(folder, "ckpt", "export", "--to", "out")
    assert done.code == 0, done.err
    assert f"exported step_00000007.1 of {run.id} to out: " in done.out
    assert done.out.endswith("model_type mixtral\n")
    imported = mhmoe(folder, "ckpt", "import", "out", "--name", "mine", "--seq-len", "32")
    assert imported.code == 0, imported.err
    assert imported.out.startswith("imported out as run mine-")
    return folder, run, imported.out.split()[-1]


def test_list_and_status_show_where_an_imported_run_comes_from(project):
    folder, run, id_ = project
    listed = mhmoe(folder, "list", "--json").json()
    assert [(r["run"], r["state"], r["steps"]) for r in listed] == [(run.id, "finished", 20), (id_, "imported", None)]
    assert id_ in mhmoe(folder, "list").out
    status = mhmoe(folder, "status", "--json").json()
    assert (status["run"], status["state"], status["source"]) == (id_, "imported", str(folder / "out"))
    assert status["checkpoint"]["name"] == "step_00000000.0"
    shown = mhmoe(folder, "status", COLUMNS="300").out
    for part in (f"{id_}: imported", f"{folder}/out", "step_00000000.0"):
        assert part in shown
    assert "cluster" not in shown


@pytest.mark.parametrize("verb", ["resume", "stop", "logs"])
def test_what_needs_a_job_is_refused_for_an_imported_run(project, verb):
    folder, _, id_ = project
    why = f"run {id_}: it was imported, not trained here, so it has no job; serve it"
    assert_one_line(mhmoe(folder, verb, id_), 7, why)
    # Without a name, it is not the imported run that is meant, though it is the newest.
    assert id_ not in mhmoe(folder, verb).err


def test_an_imported_run_is_exported_like_any_other(project):
    folder, _, id_ = project
    assert mhmoe(folder, "ckpt", "export", id_, "--to", "again", "--checkpoint", "step_00000000.0").code == 0
    for file in (folder / "again").glob("*.safetensors"):
        assert file.read_bytes() == (folder / "out" / file.name).read_bytes()
    assert json.loads((folder / "again" / "config.json").read_text())["max_position_embeddings"] == 32


def test_mistakes_are_one_line(project, tmp_path):
    folder, run, _ = project
    assert_one_line(mhmoe(folder, "ckpt", "export", "--to", "out"), 8, "folder out: it is not empty")
    assert_one_line(
        mhmoe(folder, "ckpt", "export", run.id, "--to", "x", "--checkpoint", "y"), 8, "no readable manifest.json"
    )
    assert_one_line(mhmoe(folder, "ckpt", "export", "nobody", "--to", "x"), 7, "run nobody")
    assert_one_line(mhmoe(folder, "ckpt", "import", "nowhere"), 8, "folder nowhere", "config.json cannot be read")
    assert_one_line(mhmoe(folder, "ckpt", "import", "out", "--name", "A b"), 3, "name A b", "lower-case")
    (tmp_path / "file").write_text("")
    result = mhmoe(folder, "ckpt", "import", "out", "--storage", str(tmp_path / "file"))
    assert_one_line(result, 3, "set storage to a folder you can write")
    assert not (folder / "x").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(project, tmp_path):
    """The shell's limit on the size of files stands in for a full disk."""
    folder, _, _ = project
    for words, code in (
        (("export", "--to", str(tmp_path / "x")), 8),
        (("import", "out", "--storage", str(tmp_path)), 3),
    ):
        limited = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *command("ckpt", *words)]
        done = subprocess.run(limited, cwd=folder, capture_output=True, text=True)
        assert_one_line(Result(done.returncode, done.stdout, done.stderr), code, "File too large")
    assert not list(tmp_path.iterdir())


def test_verify_passes_over_what_is_dropped_meanwhile_and_says_so(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path, MIXTRAL)
    old = run.checkpoints / "step_00000005.1"
    shutil.copytree(run.checkpoints / "step_00000007.1", old)
    describe = storage.describe_file

    def dropped_when_read(path):
        if path.is_relative_to(old) and old.exists():
            drop(old)
        return describe(path)

    monkeypatch.setattr(storage, "describe_file", dropped_when_read)
    verify(run.id, str(run.path.parent), json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["dropped"], found["unfinished"]) == (["step_00000005.1"], [])
    assert found["checkpoints"] == [{"name": "step_00000007.1", "whole": True, "why": None}]
    shutil.copytree(run.checkpoints / "step_00000007.1", old)
    verify(run.id, str(run.path.parent), json=False)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert sorted((name, state.strip()) for name, state in lines) == [
        ("step_00000005.1", "dropped meanwhile"),
        ("step_00000007.1", "whole"),
    ]


def test_serve_deploy_takes_serve_keys_alone(project):
    folder, _, _ = project
    result = mhmoe(folder, "serve", "deploy", "--set", "serve.prot=1")
    assert_one_line(result, 3, "the overrides: unknown key 'serve.prot'", "did you mean 'port'?")
    assert_one_line(mhmoe(folder, "serve", "deploy", "--set", "train.lr=1"), 3, "serving does not use it")


def test_inspect_shows_where_a_checkpoint_is_and_what_it_holds(project):
    folder, run, _ = project
    found = mhmoe(folder, "ckpt", "inspect", run.id, "--json").json()
    assert (found["run"], found["name"], found["step"], found["tokens"]) == (run.id, "step_00000007.1", 7, 448)
    assert found["files"].keys() == {
        str(p.relative_to(found["path"])) for p in run.checkpoints.glob("step_00000007.1/*/*")
    }
    shown = mhmoe(folder, "ckpt", "inspect", run.id, COLUMNS="200").out
    size = sum(entry["size"] for entry in found["files"].values())
    for part in (f"step_00000007.1 of {run.id}", "448", "1 workers, ep 1", f"{size / 1e3:.3g} kB in 1 files"):
        assert part in shown


def test_verify_names_what_is_damaged_and_what_was_never_finished(tmp_path):
    run = make_run(tmp_path, MIXTRAL)
    whole = mhmoe(tmp_path, "ckpt", "verify")
    assert whole.code == 0
    assert [line.split() for line in whole.out.splitlines()[1:]] == [["step_00000007.1", "whole"]]
    torn = run.checkpoints / "step_00000009.1"
    shutil.copytree(run.checkpoints / "step_00000007.1", torn)
    [file] = torn.glob("weights/*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (run.checkpoints / "step_00000011.2" / "weights").mkdir(parents=True)
    found = mhmoe(tmp_path, "ckpt", "verify", "--json")
    assert found.code == 8
    checkpoints = {c["name"]: c["why"] for c in json.loads(found.out)["checkpoints"]}
    why = f"weights/{file.name} does not have the hash it was written with"
    assert checkpoints == {"step_00000007.1": None, "step_00000009.1": why}
    assert json.loads(found.out)["unfinished"] == ["step_00000011.2"]
    assert_one_line(mhmoe(tmp_path, "ckpt", "verify"), 8, f"run {run.id}: 1 of 2 checkpoints are damaged")
