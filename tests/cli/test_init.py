"""Tests of `mhmoe init`: the spec that it writes for different texts, and what it refuses."""

import json
from pathlib import Path

import pytest

from mhmoe_ray.api.text_folder import make_text_spec
from mhmoe_ray.data.sources import find_files
from mhmoe_ray.planner.resolve import resolve_spec
from mhmoe_ray.spec.load import read_tree
from tests.cli.run import mhmoe

PROSE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()[:8192]
RECORD = json.dumps({"text": PROSE * 50})
# Each layout has the files of a folder, and the path, vocabulary, length of samples and steps of its spec.
LAYOUTS = {
    "a small file": ({"note.txt": PROSE[:300]}, ".", 512, 8, 100),
    "a file of 8 kB": ({"note.txt": PROSE}, ".", 512, 128, 100),
    "domains": ({"a/1.txt": PROSE * 10, "b/2.txt": PROSE, "README.md": "#"}, ".", 1024, 128, 235),
    "JSON lines beside a licence": ({"a.jsonl": RECORD, "b.txt": "Free."}, ".", 2048, 128, 500),
    "a folder without text": ({"a/1.txt": PROSE, "img/1.png": "x"}, "a", 512, 128, 100),
    "files and an environment": ({"1.txt": PROSE, "env/pyvenv.cfg": "", "env/2.txt": PROSE * 9}, "*", 512, 128, 100),
    "formats": ({"a/1.txt": PROSE, "b/1.jsonl": RECORD}, "b", 2048, 128, 500),
    "a run and prepared samples": (
        {"1.txt": PROSE}
        | {f"runs/r-1/{name}": "{}" for name in ("run.json", "spec.yaml", "events.jsonl")}
        | {f"data/r/{name}": "{}" for name in ("manifest.json", "quarantine.jsonl")},
        ".", 512, 128, 100,
    ),
}  # fmt: skip


def write_files(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spec_names_the_text_and_can_be_submitted(tmp_path, layout):
    files, path, vocab_size, seq_len, steps = LAYOUTS[layout]
    write_files(tmp_path, files)
    init_result = mhmoe(tmp_path, "init")
    assert (init_result.code, init_result.out) == (
        0,
        "wrote spec.yaml; next:\n  mhmoe submit spec.yaml\n  mhmoe serve deploy\n",
    )
    dry_run = mhmoe(tmp_path, "submit", "spec.yaml", "--dry-run")
    assert dry_run.code == 0, dry_run.err
    spec = resolve_spec(read_tree(tmp_path / "spec.yaml"), "spec").with_absolute_paths(tmp_path)
    assert spec.data.sources["text"].path == str(tmp_path / path)
    assert (spec.model.vocab_size, spec.data.seq_len, spec.train.steps) == (vocab_size, seq_len, steps)
    outputs = ("runs/", "data/", "env/", "img/")
    read_files = {str(Path(file.path).relative_to(tmp_path)) for file in find_files(spec.data)}
    assert read_files <= {name for name in files if not name.startswith(outputs)}
    assert read_files


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, [], "error: folder .: no text in it can be read: there is no file below "),
        ({"a.png": "x"}, [], "holds no file ending in .jsonl, "),
        ({"a.jsonl": '{"body": "x"}'}, [], "it has no text (no 'text' among 'body'); put text into it"),
        ({"a.txt": "hello\n"}, [], "error: folder .: its text of 6 bytes is too short to train on; add text"),
        ({"a.txt": PROSE, "spec.yaml": ""}, [], "error: spec spec.yaml: it exists already; remove it, or name another"),
        ({}, ["books"], "error: folder books: it does not exist; name a folder that has text"),
    ],
)
def test_refusals_are_one_line(tmp_path, files, arguments, message):
    write_files(tmp_path, files)
    refusal = mhmoe(tmp_path, "init", *arguments)
    assert refusal.code in (3, 4)
    assert message in refusal.err
    assert refusal.err.count("\n") == 1
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == files.keys()


def test_empty_files_are_allowed_by_their_number(tmp_path):
    write_files(tmp_path, {"a.txt": PROSE, "b.txt": "", "c.txt": ""})
    assert "max_bad_lines: 2" in make_text_spec(tmp_path).text


@pytest.mark.ray
def test_smallest_text_trains(tmp_path, lane_home):
    write_files(tmp_path, {"note.txt": PROSE[:256]})
    assert mhmoe(tmp_path, "init", "note.txt", "--output", "small.yaml").code == 0
    submission = mhmoe(tmp_path, "submit", "small.yaml", "--set", "train.steps=2")
    assert submission.code == 0, submission.err
    assert "finished at step 2" in submission.out + submission.err
