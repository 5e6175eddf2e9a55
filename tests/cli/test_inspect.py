"""Tests of `mhmoe data inspect` and `mhmoe data lint`, most of them on a real cluster."""

import hashlib
import json
from pathlib import Path

import pytest

from mhmoe_ray.api.survey import survey_target
from mhmoe_ray.cli.data_inspect_view import print_sample
from mhmoe_ray.data.inspect.result import SurveyRequest
from mhmoe_ray.data.inspect.samples import DecodedSample, SamplePart
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.sources import find_files
from tests.cli.conftest import write_spec
from tests.cli.run import assert_one_line, mhmoe
from tests.data.texts import make_documents, write_corpus, write_documents

# There are few files, because a job starts one or more processes for each file, which takes time.
TEXTS = {"web/a": make_documents("one", 65), "web/b": make_documents("two", 30)}


@pytest.fixture(scope="module")
def project(local_cluster, tmp_path_factory) -> Path:
    """Return a project folder with two raw files and spec.yaml, whose data is prepared."""
    folder = tmp_path_factory.mktemp("project")
    write_documents(folder / "raw/a/one.jsonl.zst", TEXTS["web/a"])
    write_documents(folder / "raw/b/two.jsonl.gz", TEXTS["web/b"])
    write_spec(folder)
    assert mhmoe(folder, "data", "prepare", "spec.yaml").code == 0
    return folder


@pytest.mark.ray
def test_inspect_of_prepared_data_agrees_with_its_manifest(project):
    result = mhmoe(project, "data", "inspect", "spec.yaml", "--json", "--png", "image.png")
    report = result.json()
    assert "inspect: read 2 of 2 files" in result.err
    assert {name: row["documents"] for name, row in report["domains"].items()} == {"web/a": 65, "web/b": 30}
    for name, row in report["domains"].items():
        prepared_row = report["prepared"]["domains"][name]
        assert row["held_out"] == prepared_row["validation_documents"] == row["documents"] - prepared_row["documents"]
        assert sum(row["lengths_in_tokens"]["octaves"].values()) == row["documents"]
    # The manifest of prepared data counts only the tokens of training documents, and a start token for each of them.
    from mhmoe_ray.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(project / "prepared/tokenizer.json", 300)
    lengths = [len(tokenizer.encode(text).ids) for text in TEXTS["web/b"]]
    assert report["domains"]["web/b"]["tokens"] == sum(lengths)
    assert report["prepared"]["domains"]["web/b"]["tokens"] == sum(
        n + 1 for n, text in zip(lengths, TEXTS["web/b"], strict=True) if not is_validation(text, 0.2)
    )
    assert (project / "image.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ray
def test_inspect_of_two_raw_folders_shows_all_tables(local_cluster, tmp_path):
    write_documents(tmp_path / "raw/b/two.jsonl.gz", TEXTS["web/b"])
    write_documents(tmp_path / "more" / "de" / "x.jsonl", ["Ein Text.", "Noch ein Text.", "Ein Text."])
    result = mhmoe(tmp_path, "data", "inspect", "raw", str(tmp_path / "more"))
    assert result.code == 0, result
    lines = result.out.splitlines()
    assert lines[0] == "raw, more: 33 documents, 9.41 kB of text"
    assert "no tokens" in lines[1]
    tables = {line.split(",")[0].split(":")[0] for line in lines if line and not line.startswith(" ")}
    assert {"by domain", "by language", "exact copies of other documents"} <= tables
    assert next(line for line in lines if line.startswith("  b ")).split("B ")[1].split()[0] == "30"
    assert next(line.split() for line in lines if line.startswith("de "))[1] == "3"
    assert f"2 times: {tmp_path}/more/de/x.jsonl:1, {tmp_path}/more/de/x.jsonl:3" in lines
    assert "…" not in result.out


@pytest.mark.ray
def test_inspect_shows_packed_samples(project):
    samples = mhmoe(project, "data", "inspect", "spec.yaml", "--samples", "3", "--at", "7", "--json").json()
    assert [sample["position"] for sample in samples] == [7, 8, 9]
    assert all(sum(part["tokens"] for part in sample["parts"]) == 17 for sample in samples)
    text = mhmoe(project, "data", "inspect", "spec.yaml", "--samples", "1", "--at", "7").out
    assert text.startswith(f"position 7 (step 0): {samples[0]['domain']}, its sample {samples[0]['sample']}")
    for part in samples[0]["parts"]:
        assert f", {part['tokens']} tokens\n{part['text']}" in text
    result = mhmoe(project, "data", "inspect", "spec.yaml", "--samples", "1", "--at", "240")
    assert_one_line(result, 4, "the training has 240")


def test_last_start_token_is_shown_as_the_end_of_a_document(capsys):
    parts = [
        SamplePart(False, 3, "so far", 0, 3),
        SamplePart(True, 4, "and on", 3, 4),
        SamplePart(True, 1, "", 7, 0),
    ]
    print_sample(DecodedSample(position=5, step=1, domain="web/a", sample=2, parts=parts, padding=9))
    assert capsys.readouterr().out.splitlines() == [
        "position 5 (step 1): web/a, its sample 2, 9 tokens of padding",
        "--- it goes on from the previous sample, 3 tokens",
        "so far",
        "--- a document begins, 4 tokens",
        "and on",
        "--- the document ends",
        "",
    ]


@pytest.mark.ray
def test_lint_lists_warnings_and_errors(local_cluster, tmp_path):
    write_documents(tmp_path / "raw" / "b" / "two.jsonl", TEXTS["web/b"])
    (tmp_path / "raw" / "notes.md").write_text("about")
    with (tmp_path / "raw" / "b" / "bad.jsonl").open("w") as out:
        out.write('{"text": "a <|endoftext|> b"}\n{torn\n')
    failed = mhmoe(tmp_path, "data", "lint", "raw")
    assert_one_line(failed, 4, "data of raw: 1 error and 2 warnings")
    assert "warning unread-files: files that are not of format jsonl are not read" in failed.out.splitlines()
    assert f"{tmp_path}/raw/b/bad.jsonl:1  'a <|endoftext|> b'" in failed.out
    assert f"{tmp_path}/raw/b/bad.jsonl:2" in failed.out


@pytest.mark.ray
@pytest.mark.slow  # the quick tests of the rules are in tests/data/inspect
def test_strict_lint_of_a_spec_fails_on_a_warning(project):
    overrides = ("--set", "train.steps=2000")
    result = mhmoe(project, "data", "lint", "spec.yaml", *overrides, "--strict", "--json")
    problems = json.loads(result.out)
    assert {(problem["rule"], problem["severe"]) for problem in problems} == {("epochs", False)}
    assert_one_line(result, 4, "data of tiny: 1 warning")


def test_thousand_paths_fit_into_an_environment_variable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [f"c4/{hashlib.sha256(bytes([i % 256, i // 256])).hexdigest()}.jsonl" for i in range(1_100)]
    target = survey_target(paths)
    request = SurveyRequest(data=target.data, tokenizer=target.tokenizer, rules=True)
    [(name, value)] = request.environment.items()
    assert len(f"{name}={value}") < 131_072 < len(request.model_dump_json())
    monkeypatch.setenv(name, value)
    assert SurveyRequest.received() == request


def test_raw_text_can_be_in_a_folder_of_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "prepared" / "x.jsonl", ["text"])
    assert [len(find_files(survey_target([name]).data)) for name in ("prepared", ".")] == [1, 1]


def test_mistakes_are_one_line(tmp_path):
    write_corpus(tmp_path / "raw")
    write_spec(tmp_path)
    # The path of the image is checked before any text is read, so this command needs no cluster.
    result = mhmoe(tmp_path, "data", "inspect", "raw", "--png", "no/a.png")
    assert_one_line(result, 4, "image no/a.png", "No such file")
    for verb in ("inspect", "lint"):
        assert_one_line(mhmoe(tmp_path, "data", verb, "nowhere"), 4, "source nowhere", "there is no file or folder")
        assert_one_line(mhmoe(tmp_path, "data", verb, "spec.yaml", "raw"), 3, "spec.yaml", "together with other data")
        override_result = mhmoe(tmp_path, "data", verb, "raw", "--set", "data.seqlen=3")
        assert_one_line(override_result, 3, "text raw", "unknown key 'data.seqlen'")
    samples_result = mhmoe(tmp_path, "data", "inspect", "raw", "--samples", "1")
    assert samples_result.code == 2
    assert "give a spec with prepared data" in " ".join(samples_result.err.split())
    unprepared_result = mhmoe(tmp_path, "data", "inspect", "spec.yaml", "--samples", "1")
    assert_one_line(unprepared_result, 4, "it is not there", "mhmoe data prepare SPEC")
