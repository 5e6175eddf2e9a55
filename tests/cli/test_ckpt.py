"""Exported and imported checkpoints on the command line, with no cluster."""

import json
import subprocess

import pytest

from tests.cli.run import Result, assert_one_line, command, mhmoe
from tests.exchange.conftest import MIXTRAL, make_run


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a trained run, its export below out/, and that imported again; (folder, run, imported run's id)."""
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
    """A limit on the size of files, from the shell, stands for the disk."""
    folder, _, _ = project
    for words, code in (
        (("export", "--to", str(tmp_path / "x")), 8),
        (("import", "out", "--storage", str(tmp_path)), 3),
    ):
        limited = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *command("ckpt", *words)]
        done = subprocess.run(limited, cwd=folder, capture_output=True, text=True)
        assert_one_line(Result(done.returncode, done.stdout, done.stderr), code, "File too large")
    assert not list(tmp_path.iterdir())


def test_serve_deploy_takes_serve_keys_alone(project):
    folder, _, _ = project
    result = mhmoe(folder, "serve", "deploy", "--set", "serve.prot=1")
    assert_one_line(result, 3, "the overrides: unknown key 'serve.prot'", "did you mean 'port'?")
    assert_one_line(mhmoe(folder, "serve", "deploy", "--set", "train.lr=1"), 3, "serving does not use it")
