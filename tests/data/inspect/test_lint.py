"""Each lint rule on data that break it, and on data that do not."""

import json

import pytest

from mhmoe_ray.data.inspect.lint import Data, lint
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.spec import RunSpec
from tests.data.inspect.surveys import survey_serially
from tests.data.shards.manifests import manifest_of
from tests.data.sources.v2_files import write_v2
from tests.data.texts import documents, write_corpus, write_documents, write_lines
from tests.llama_tokenizer import llama_tokenizer
from tests.specs import tiny_spec

BIG_ENOUGH = {"validation_fraction": 0.4, "seq_len": 16}


def problems(data, spec: RunSpec | None = None, manifest=None, tokenizer=None):
    return lint(Data(survey_serially(data, tokenizer), data, spec, manifest))


def of_spec(folder, manifest=None, tokenizer=None, train=None, **data):
    spec = tiny_spec(folder, data={**BIG_ENOUGH, **data}, train=train or {})
    return problems(spec.data, spec, manifest, tokenizer)


def rules(found):
    return {problem.rule for problem in found}


def only(found):
    [problem] = found
    return problem


@pytest.fixture
def folder(tmp_path):
    """Return a folder with sound text in raw/."""
    write_corpus(tmp_path / "raw")
    return tmp_path


def test_sound_text_has_no_problem(folder):
    assert of_spec(folder) == []
    assert of_spec(folder, manifest_of({"web/a": 60, "web/b": 60, "web/c": 60})) == []


def test_damaged_texts_by_domain_with_their_places(folder):
    write_documents(folder / "raw/a/web.jsonl", ["lost \ufffd", "too \ufffd", *documents("x", 2), "a <|endoftext|> b"])
    lost, special = of_spec(folder)
    assert (special.rule, special.severe, special.where, special.count) == ("special-token", False, "web/a", 1)
    assert special.examples == [(f"{folder}/raw/a/web.jsonl:5", "'a <|endoftext|> b'")]
    assert (lost.rule, lost.severe, lost.count) == ("replacement-character", False, 2)
    assert [place for place, _ in lost.examples] == [f"{folder}/raw/a/web.jsonl:{line}" for line in (1, 2)]


def test_unreadable_lines_are_errors_past_the_limit(folder):
    write_lines(folder / "raw/b/torn.jsonl", [b"{torn", b'{"text": ""}', json.dumps({"text": "fine"}).encode()])
    torn, empty = of_spec(folder)
    assert (torn.rule, torn.severe, torn.where) == ("unreadable", True, "web/b")
    assert (torn.says, torn.count) == ("it is not JSON", 1)
    assert (empty.says, empty.count) == ("its text is empty", 1)
    places = [place for p in (torn, empty) for place, _ in p.examples]
    assert places == [f"{folder}/raw/b/torn.jsonl:{line}" for line in (1, 2)]
    assert "data.max_bad_lines" in torn.fix
    allowed = of_spec(folder, max_bad_lines=2)
    assert [p.severe for p in allowed] == [False, False]


def test_a_cut_off_file_is_unreadable(folder):
    shard = folder / "raw/a/two.jsonl.zst"
    shard.write_bytes(shard.read_bytes()[:-20])
    problem = only(of_spec(folder))
    assert (problem.rule, problem.severe, problem.says) == ("unreadable", True, "a part of the file is lost")
    assert only(of_spec(folder, max_bad_files=1)).severe is False


def test_files_that_no_format_takes(folder):
    (folder / "raw/README.md").write_text("about")
    (folder / "raw/b/old.csv").write_text("a,b")
    (folder / "raw/.hidden").write_text("")
    problem = only(of_spec(folder))
    assert (problem.rule, problem.where, problem.count) == ("unread-files", "web", 2)
    assert {place for place, _ in problem.examples} == {f"{folder}/raw/README.md", f"{folder}/raw/b/old.csv"}
    shares = {"sources": {"web": {"path": "raw", "shares": {"a": 1}}}}
    assert of_spec(folder, **shares) == [], "only what is in folders that are read"
    write_documents(folder / "raw/top.jsonl", documents("top", 40))
    shares = {"sources": {"web": {"path": "raw", "shares": {"all": 1}}}}
    assert only(of_spec(folder, **shares)).examples == [(f"{folder}/raw/README.md", "")]


def test_files_beside_redpajama_v2s_are_no_problem(tmp_path):
    write_v2(tmp_path / "raw", "2023-06/0000/en_head", [{"text": text} for text in documents("x", 30)])
    found = of_spec(tmp_path)
    assert "unread-files" not in rules(found)


def test_copies_within_and_across_domains(folder):
    copied = documents("copied", 3)
    write_documents(folder / "raw/a/again.jsonl", copied * 2)
    write_documents(folder / "raw/c/again.jsonl", copied)
    found = of_spec(folder)
    copies = only(p for p in found if p.rule == "copies")
    assert (copies.where, copies.count, copies.severe) == ("web/a", 3, False)
    shared = {p.where: p for p in found if p.rule == "shared-texts"}
    assert {where: p.count for where, p in shared.items()} == {"web/a": 3, "web/c": 3}
    assert shared["web/c"].examples == [("web/a and web/c", "3 texts in both")]


def test_shared_texts_of_a_domain_with_a_comma_in_its_name(folder):
    for name in ("a", "x, y and z"):
        write_documents(folder / f"raw/{name}/again.jsonl", documents("copied", 3))
    shared = {p.where: p.examples for p in of_spec(folder) if p.rule == "shared-texts"}
    examples = [("web/a and web/x, y and z", "3 texts in both")]
    assert shared == {"web/a": examples, "web/x, y and z": examples}


def test_domains_that_fill_no_sample(folder):
    write_documents(folder / "raw/d/x.jsonl", ["tiny"])
    small = {p.rule: p for p in of_spec(folder)}
    assert small.keys() == {"too-small", "no-validation"}
    assert (small["too-small"].where, small["too-small"].severe) == ("web/d", False)
    named = {"sources": {"web": {"path": "raw", "shares": {"a": 1, "d": 1}}}}
    assert only(p for p in of_spec(folder, **named) if p.rule == "too-small").severe is True
    manifest = manifest_of({"web/a": 60, "web/b": 0, "web/c": 60, "web/d": 60})
    assert only(p for p in of_spec(folder, manifest) if p.rule == "too-small").where == "web/b"


def test_a_domain_that_only_a_later_phase_names_must_fill_a_sample(folder):
    write_documents(folder / "raw/d/x.jsonl", ["tiny"])
    named = {"from_step": 10, "sources": {"web": {"shares": {"a": 1, "d": 1}}}}
    too_late = {**named, "from_step": 20}
    for schedule, severe in (([named], True), ([too_late], False)):
        small = only(p for p in of_spec(folder, schedule=schedule) if p.rule == "too-small")
        assert (small.where, small.severe) == ("web/d", severe)
    unread = {"web": {"path": "raw", "weight": 0, "shares": {"d": 1}}, "more": {"path": "raw"}}
    found = {p.where: p.severe for p in of_spec(folder, sources=unread) if p.rule == "too-small"}
    assert found == {"web/d": False, "more/d": False}


def test_best_fit_needs_a_document_and_no_length(folder):
    write_documents(folder / "raw/d/x.jsonl", ["tiny"])
    assert not is_validation("tiny", BIG_ENOUGH["validation_fraction"])
    assert rules(of_spec(folder, packing="best_fit")) == {"no-validation"}
    held_out = next(text for text in documents("d", 40) if is_validation(text, 0.4))
    write_documents(folder / "raw/d/x.jsonl", [held_out])
    small = only(of_spec(folder, packing="best_fit"))
    assert (small.rule, small.where) == ("too-small", "web/d")
    assert small.says == "it has no document to train on"


def test_what_preparing_leaves_below_a_source_is_no_unread_file(folder):
    for name in ("out/manifest.json", "out.partial-0a1b/progress.json"):
        (folder / "raw" / name).parent.mkdir()
        (folder / "raw" / name).touch()
    assert of_spec(folder, prepared="raw/out") == []


def test_nothing_held_out(folder):
    found = of_spec(folder, validation_fraction=1e-9)
    assert {(p.rule, p.where) for p in found} == {("no-validation", f"web/{name}") for name in "abc"}


def test_raw_text_has_no_size_to_fill(folder):
    data = tiny_spec(folder, data=BIG_ENOUGH | {"validation_fraction": 1e-9, "seq_len": 1 << 20}).data
    assert problems(data) == []


def test_domains_that_are_read_too_often(folder):
    # 20 steps of 8 samples: 160, by size.
    manifest = manifest_of({"web/a": 30, "web/b": 30, "web/c": 30})
    assert of_spec(folder, manifest) == []
    flat = {"sources": {"web": {"path": "raw", "alpha": 0.0}}}
    manifest = manifest_of({"web/a": 300, "web/b": 10, "web/c": 300})
    problem = only(of_spec(folder, manifest, **flat))
    assert (problem.rule, problem.where, problem.severe) == ("epochs", "web/b", False)
    assert problem.examples[0][1].startswith("5.3 epochs of 10")


def test_a_mixture_that_cannot_be(folder):
    manifest = manifest_of({"web/a": 3, "web/b": 3, "web/c": 3})
    problem = only(of_spec(folder, manifest, sources={"web": {"path": "raw", "max_epochs": 1}}))
    assert (problem.rule, problem.severe) == ("mixture", True)
    assert "max_epochs allows 9 samples" in problem.says


def test_a_tokenizer_that_does_not_know_the_language(folder):
    path = folder / "tokenizer.json"
    llama_tokenizer(documents("a-one", 40), 600).save(str(path))
    assert of_spec(folder, tokenizer=path) == []
    write_documents(folder / "raw/ru/x.jsonl", [f"Привет, как дела? {i}" * 9 for i in range(40)])
    problem = only(of_spec(folder, tokenizer=path))
    assert (problem.rule, problem.where, problem.severe) == ("fertility", "web/ru", False)
    assert problem.examples[0][0] == "web/ru ru"


def test_a_tokenizer_with_unknown_tokens(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    found = of_spec(folder, tokenizer=folder / "tokenizer.json")
    assert {(p.rule, p.where) for p in found} == {("unknown-tokens", f"web/{name}") for name in "ab"}  # c is too short


def test_errors_come_first(folder):
    write_documents(folder / "raw/a/web.jsonl", ["lost \ufffd"])
    write_lines(folder / "raw/c/torn.jsonl", [b"{torn"])
    (folder / "raw/x.md").write_text("about")
    assert [p.severe for p in of_spec(folder)] == [True, False, False]
