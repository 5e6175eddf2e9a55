"""Tests of `mhmoe ckpt` and of imported runs on the command line, without a cluster."""

import json
import shutil
import subprocess

import pytest

from mhmoe_ray.api.serve_target import resolve_target
from mhmoe_ray.checkpoint.retention import delete_checkpoint
from mhmoe_ray.cli.ckpt import verify
from mhmoe_ray.storage import files as storage_files
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import Result, assert_one_line, command, mhmoe


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Export a trained run to out/ and import it again; return the folder, the run, and the id of the imported run."""
    folder = tmp_path_factory.mktemp("project")
    run = make_run(folder, MIXTRAL)
    export_result = mhmoe(folder, "ckpt", "export", "--to", "out")
    assert export_result.code == 0, export_result.err
    assert f"exported step_00000007.1 of {run.id} to out: " in export_result.out
    assert export_result.out.endswith("model_type mixtral\n")
    import_result = mhmoe(folder, "ckpt", "import", "out", "--name", "mine", "--seq-len", "32")
    assert import_result.code == 0, import_result.err
    assert import_result.out.startswith("imported out as run mine-")
    return folder, run, import_result.out.split()[-1]


def test_list_and_status_show_where_an_imported_run_comes_from(project):
    folder, run, id_ = project
    rows = mhmoe(folder, "list", "--json").json()
    assert [(r["run"], r["state"], r["steps"]) for r in rows] == [(run.id, "finished", 20), (id_, "imported", None)]
    assert id_ in mhmoe(folder, "list").out
    status = mhmoe(folder, "status", "--json").json()
    assert (status["run"], status["state"], status["source"]) == (id_, "imported", str(folder / "out"))
    assert status["checkpoint"]["name"] == "step_00000000.0"
    output = mhmoe(folder, "status", COLUMNS="300").out
    for part in (f"{id_}: imported", f"{folder}/out", "step_00000000.0"):
        assert part in output
    assert "cluster" not in output


@pytest.mark.parametrize("verb", ["resume", "stop", "logs"])
def test_commands_that_need_a_job_refuse_an_imported_run(project, verb):
    folder, _, id_ = project
    message = f"run {id_}: it was imported, not trained here, so it has no job; serve it"
    assert_one_line(mhmoe(folder, verb, id_), 7, message)
    # Without the id of a run, these commands skip the imported run, although it is the newest.
    assert id_ not in mhmoe(folder, verb).err


def test_a_step_can_be_imported_and_served(project):
    folder, run, _ = project
    storage = str(run.path.parent)
    imported = mhmoe(folder, "ckpt", "import", f"{run.path}@7", "--name", "step", "--storage", str(folder / "imports"))
    assert imported.code == 0, imported.err
    assert_one_line(mhmoe(folder, "ckpt", "import", f"{run.path}@8"), 8, "no checkpoint of this step")
    assert resolve_target(f"{run.id}@7", None, storage)[1].name == "step_00000007.1"


def test_imported_run_can_be_exported(project):
    folder, _, id_ = project
    assert mhmoe(folder, "ckpt", "export", id_, "--to", "again", "--checkpoint", "step_00000000.0").code == 0
    for file in (folder / "again").glob("*.safetensors"):
        assert file.read_bytes() == (folder / "out" / file.name).read_bytes()
    assert json.loads((folder / "again" / "config.json").read_text())["max_position_embeddings"] == 32


def test_mistakes_are_one_line(project, tmp_path):
    folder, run, _ = project
    assert_one_line(mhmoe(folder, "ckpt", "export", "--to", "out"), 8, "folder out: it is not empty")
    assert_one_line(
        mhmoe(folder, "ckpt", "export", run.id, "--to", "x", "--checkpoint", "y"),
        8,
        "no checkpoint of this name; choose from",
    )
    assert_one_line(mhmoe(folder, "ckpt", "export", "nobody", "--to", "x"), 7, "run nobody")
    assert_one_line(mhmoe(folder, "ckpt", "import", "nowhere"), 8, "model nowhere: there is no such folder")
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
        process = subprocess.run(limited, cwd=folder, capture_output=True, text=True)
        assert_one_line(Result(process.returncode, process.stdout, process.stderr), code, "File too large")
    assert not list(tmp_path.iterdir())


def test_verify_skips_and_reports_a_checkpoint_dropped_meanwhile(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path, MIXTRAL)
    old_checkpoint = run.checkpoints / "step_00000005.1"
    shutil.copytree(run.checkpoints / "step_00000007.1", old_checkpoint)
    describe = storage_files.describe_file

    def drop_when_read(path):
        if path.is_relative_to(old_checkpoint) and old_checkpoint.exists():
            delete_checkpoint(old_checkpoint)
        return describe(path)

    monkeypatch.setattr(storage_files, "describe_file", drop_when_read)
    verify(run.id, storage=str(run.path.parent), json=True)
    report = json.loads(capsys.readouterr().out)
    assert (report["dropped"], report["unfinished"]) == (["step_00000005.1"], [])
    assert report["checkpoints"] == [{"name": "step_00000007.1", "whole": True, "why": None}]
    shutil.copytree(run.checkpoints / "step_00000007.1", old_checkpoint)
    verify(run.id, storage=str(run.path.parent), json=False)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert sorted((name, state.strip()) for name, state in lines) == [
        ("step_00000005.1", "dropped meanwhile"),
        ("step_00000007.1", "whole"),
    ]


def test_serve_deploy_takes_only_keys_of_the_serve_section(project):
    folder, _, _ = project
    result = mhmoe(folder, "serve", "deploy", "--set", "serve.prot=1")
    assert_one_line(result, 3, "the overrides: unknown key 'serve.prot'", "did you mean 'port'?")
    assert_one_line(mhmoe(folder, "serve", "deploy", "--set", "train.lr=1"), 3, "serving does not use it")


def test_inspect_shows_path_and_contents_of_a_checkpoint(project):
    folder, run, _ = project
    report = mhmoe(folder, "ckpt", "inspect", run.id, "--json").json()
    assert (report["run"], report["name"], report["step"], report["tokens"]) == (run.id, "step_00000007.1", 7, 448)
    assert report["files"].keys() == {
        str(p.relative_to(report["path"])) for p in run.checkpoints.glob("step_00000007.1/*/*")
    }
    output = mhmoe(folder, "ckpt", "inspect", run.id, COLUMNS="200").out
    size = sum(entry["size"] for entry in report["files"].values())
    for part in (f"step_00000007.1 of {run.id}", "448", "1 worker, ep 1", f"{size / 1e3:.3g} kB in 1 file"):
        assert part in output


def test_verify_names_damaged_and_unfinished_checkpoints(tmp_path):
    run = make_run(tmp_path, MIXTRAL)
    result = mhmoe(tmp_path, "ckpt", "verify")
    assert result.code == 0
    assert [line.split() for line in result.out.splitlines()[1:]] == [["step_00000007.1", "whole"]]
    damaged_checkpoint = run.checkpoints / "step_00000009.1"
    shutil.copytree(run.checkpoints / "step_00000007.1", damaged_checkpoint)
    [file] = damaged_checkpoint.glob("weights/*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (run.checkpoints / "step_00000011.2" / "weights").mkdir(parents=True)
    json_result = mhmoe(tmp_path, "ckpt", "verify", "--json")
    assert json_result.code == 8
    checkpoints = {c["name"]: c["why"] for c in json.loads(json_result.out)["checkpoints"]}
    reason = f"weights/{file.name} does not have the hash it was written with"
    assert checkpoints == {"step_00000007.1": None, "step_00000009.1": reason}
    assert json.loads(json_result.out)["unfinished"] == ["step_00000011.2"]
    assert_one_line(mhmoe(tmp_path, "ckpt", "verify"), 8, f"run {run.id}: 1 of 2 checkpoints are damaged")
    assert mhmoe(tmp_path, "ckpt", "verify", f"{run.id}@7").code == 0
    assert_one_line(mhmoe(tmp_path, "ckpt", "verify", f"{run.id}@9"), 8, "1 of 1 checkpoints are damaged")
