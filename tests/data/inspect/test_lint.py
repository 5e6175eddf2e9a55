"""Tests of each lint rule, on data that break it and on data that do not."""

import json

import pytest

from mhmoe_ray.data.inspect.lint import LintInput, lint
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.spec import RunSpec
from tests.data.inspect.surveys import survey_serially
from tests.data.shards.manifests import make_manifest
from tests.data.sources.v2_files import write_v2_files
from tests.data.texts import make_documents, write_corpus, write_documents, write_lines
from tests.support.llama_tokenizer import llama_tokenizer
from tests.support.specs import tiny_spec

BIG_ENOUGH = {"validation_fraction": 0.4, "seq_len": 16}


def lint_data(data, spec: RunSpec | None = None, manifest=None, tokenizer=None):
    return lint(LintInput(survey_serially(data, tokenizer), data, spec, manifest))


def lint_spec(folder, manifest=None, tokenizer=None, train=None, **data):
    """Return the problems of the text in `folder`; `data` and `train` are changes to the spec's sections."""
    spec = tiny_spec(folder, data={**BIG_ENOUGH, **data}, train=train or {})
    return lint_data(spec.data, spec, manifest, tokenizer)


def rules_of(problems):
    return {problem.rule for problem in problems}


def only_problem(problems):
    [problem] = problems
    return problem


@pytest.fixture
def folder(tmp_path):
    """Write sound text into raw/ of a folder, and return the folder."""
    write_corpus(tmp_path / "raw")
    return tmp_path


def test_lint_finds_no_problem_in_sound_text(folder):
    assert lint_spec(folder) == []
    assert lint_spec(folder, make_manifest({"web/a": 60, "web/b": 60, "web/c": 60})) == []


def test_lint_names_damaged_texts_with_their_locations(folder):
    write_documents(
        folder / "raw/a/web.jsonl", ["lost \ufffd", "too \ufffd", *make_documents("x", 2), "a <|endoftext|> b"]
    )
    lost_characters, special_token = lint_spec(folder)
    assert (special_token.rule, special_token.severe, special_token.subject, special_token.count) == (
        "special-token",
        False,
        "web/a",
        1,
    )
    assert special_token.examples == [(f"{folder}/raw/a/web.jsonl:5", "'a <|endoftext|> b'")]
    assert (lost_characters.rule, lost_characters.severe, lost_characters.count) == ("replacement-character", False, 2)
    assert [location for location, _ in lost_characters.examples] == [
        f"{folder}/raw/a/web.jsonl:{line}" for line in (1, 2)
    ]


def test_lint_makes_unreadable_lines_errors_above_the_limit(folder):
    write_lines(folder / "raw/b/torn.jsonl", [b"{torn", b'{"text": ""}', json.dumps({"text": "fine"}).encode()])
    torn_line, empty_text = lint_spec(folder)
    assert (torn_line.rule, torn_line.severe, torn_line.subject) == ("unreadable", True, "web/b")
    assert (torn_line.message, torn_line.count) == ("it is not JSON", 1)
    assert (empty_text.message, empty_text.count) == ("its text is empty", 1)
    locations = [location for p in (torn_line, empty_text) for location, _ in p.examples]
    assert locations == [f"{folder}/raw/b/torn.jsonl:{line}" for line in (1, 2)]
    assert "data.max_bad_lines" in torn_line.fix
    allowed_problems = lint_spec(folder, max_bad_lines=2)
    assert [p.severe for p in allowed_problems] == [False, False]


def test_lint_reports_a_truncated_file(folder):
    shard = folder / "raw/a/two.jsonl.zst"
    shard.write_bytes(shard.read_bytes()[:-20])
    problem = only_problem(lint_spec(folder))
    assert (problem.rule, problem.severe, problem.message) == ("unreadable", True, "a part of the file is lost")
    assert only_problem(lint_spec(folder, max_bad_files=1)).severe is False


def test_lint_reports_files_of_no_format(folder):
    (folder / "raw/README.md").write_text("about")
    (folder / "raw/b/old.csv").write_text("a,b")
    (folder / "raw/.hidden").write_text("")
    problem = only_problem(lint_spec(folder))
    assert (problem.rule, problem.subject, problem.count) == ("unread-files", "web", 2)
    assert {location for location, _ in problem.examples} == {f"{folder}/raw/README.md", f"{folder}/raw/b/old.csv"}
    shares = {"sources": {"web": {"path": "raw", "shares": {"a": 1}}}}
    assert lint_spec(folder, **shares) == [], "files of other folders are reported"
    write_documents(folder / "raw/top.jsonl", make_documents("top", 40))
    shares = {"sources": {"web": {"path": "raw", "shares": {"all": 1}}}}
    assert only_problem(lint_spec(folder, **shares)).examples == [(f"{folder}/raw/README.md", "")]


def test_lint_accepts_the_tables_of_redpajama_v2(tmp_path):
    write_v2_files(tmp_path / "raw", "2023-06/0000/en_head", [{"text": text} for text in make_documents("x", 30)])
    problems = lint_spec(tmp_path)
    assert "unread-files" not in rules_of(problems)


def test_lint_reports_copies_within_and_across_domains(folder):
    copied_texts = make_documents("copied", 3)
    write_documents(folder / "raw/a/again.jsonl", copied_texts * 2)
    write_documents(folder / "raw/c/again.jsonl", copied_texts)
    problems = lint_spec(folder)
    copies_problem = only_problem(p for p in problems if p.rule == "copies")
    assert (copies_problem.subject, copies_problem.count, copies_problem.severe) == ("web/a", 3, False)
    shared_texts = {p.subject: p for p in problems if p.rule == "shared-texts"}
    assert {domain: p.count for domain, p in shared_texts.items()} == {"web/a": 3, "web/c": 3}
    assert shared_texts["web/c"].examples == [("web/a and web/c", "3 texts in both")]


def test_lint_names_domains_with_a_comma(folder):
    for name in ("a", "x, y and z"):
        write_documents(folder / f"raw/{name}/again.jsonl", make_documents("copied", 3))
    shared_texts = {p.subject: p.examples for p in lint_spec(folder) if p.rule == "shared-texts"}
    examples = [("web/a and web/x, y and z", "3 texts in both")]
    assert shared_texts == {"web/a": examples, "web/x, y and z": examples}


def test_lint_reports_domains_that_fill_no_sample(folder):
    write_documents(folder / "raw/d/x.jsonl", ["tiny"])
    problems_by_rule = {p.rule: p for p in lint_spec(folder)}
    assert problems_by_rule.keys() == {"too-small", "no-validation"}
    assert (problems_by_rule["too-small"].subject, problems_by_rule["too-small"].severe) == ("web/d", False)
    named_shares = {"sources": {"web": {"path": "raw", "shares": {"a": 1, "d": 1}}}}
    assert only_problem(p for p in lint_spec(folder, **named_shares) if p.rule == "too-small").severe is True
    manifest = make_manifest({"web/a": 60, "web/b": 0, "web/c": 60, "web/d": 60})
    assert only_problem(p for p in lint_spec(folder, manifest) if p.rule == "too-small").subject == "web/b"


def test_lint_gives_all_small_domains_the_same_advice(folder):
    for name in "de":
        write_documents(folder / f"raw/{name}/x.jsonl", ["tiny"])
    problems = [p for p in lint_spec(folder) if p.rule == "too-small"]
    assert [p.subject for p in problems] == ["web/d", "web/e"]
    assert len({(p.message, p.fix) for p in problems}) == 1


def test_lint_reports_a_small_domain_of_a_later_phase(folder):
    write_documents(folder / "raw/d/x.jsonl", ["tiny"])
    early_phase = {"from_step": 10, "sources": {"web": {"shares": {"a": 1, "d": 1}}}}
    late_phase = {**early_phase, "from_step": 20}
    for schedule, is_severe in (([early_phase], True), ([late_phase], False)):
        small_domain = only_problem(p for p in lint_spec(folder, schedule=schedule) if p.rule == "too-small")
        assert (small_domain.subject, small_domain.severe) == ("web/d", is_severe)
    unread_sources = {"web": {"path": "raw", "weight": 0, "shares": {"d": 1}}, "more": {"path": "raw"}}
    severity_by_domain = {
        p.subject: p.severe for p in lint_spec(folder, sources=unread_sources) if p.rule == "too-small"
    }
    assert severity_by_domain == {"web/d": False, "more/d": False}


def test_lint_with_best_fit_needs_one_document(folder):
    write_documents(folder / "raw/d/x.jsonl", ["tiny"])
    assert not is_validation("tiny", BIG_ENOUGH["validation_fraction"])
    assert rules_of(lint_spec(folder, packing="best_fit")) == {"no-validation"}
    held_out_text = next(text for text in make_documents("d", 40) if is_validation(text, 0.4))
    write_documents(folder / "raw/d/x.jsonl", [held_out_text])
    small_domain = only_problem(lint_spec(folder, packing="best_fit"))
    assert (small_domain.rule, small_domain.subject) == ("too-small", "web/d")
    assert small_domain.message == "it has no document to train on"


def test_lint_ignores_prepared_folders(folder):
    for name in ("out/manifest.json", "out.partial-0a1b/progress.json"):
        (folder / "raw" / name).parent.mkdir()
        (folder / "raw" / name).touch()
    assert lint_spec(folder, prepared="raw/out") == []


def test_lint_reports_domains_without_held_out_documents(folder):
    problems = lint_spec(folder, validation_fraction=1e-9)
    assert {(p.rule, p.subject) for p in problems} == {("no-validation", f"web/{name}") for name in "abc"}


def test_lint_of_raw_text_ignores_sizes(folder):
    data = tiny_spec(folder, data=BIG_ENOUGH | {"validation_fraction": 1e-9, "seq_len": 1 << 20}).data
    assert lint_data(data) == []


def test_lint_reports_domains_of_many_epochs(folder):
    # 20 steps of 8 samples read 160 samples: of each domain in proportion to its size, or with alpha 0 equally many.
    manifest = make_manifest({"web/a": 30, "web/b": 30, "web/c": 30})
    assert lint_spec(folder, manifest) == []
    flat_sources = {"sources": {"web": {"path": "raw", "alpha": 0.0}}}
    manifest = make_manifest({"web/a": 300, "web/b": 10, "web/c": 300})
    problem = only_problem(lint_spec(folder, manifest, **flat_sources))
    assert (problem.rule, problem.subject, problem.severe) == ("epochs", "web/b", False)
    assert problem.examples[0][1].startswith("5.3 epochs of 10")


def test_lint_reports_an_impossible_mixture(folder):
    manifest = make_manifest({"web/a": 3, "web/b": 3, "web/c": 3})
    problem = only_problem(lint_spec(folder, manifest, sources={"web": {"path": "raw", "max_epochs": 1}}))
    assert (problem.rule, problem.severe) == ("mixture", True)
    assert "max_epochs allows 9 samples" in problem.message


def test_lint_reports_a_tokenizer_of_other_languages(folder):
    path = folder / "tokenizer.json"
    llama_tokenizer(make_documents("a-one", 40), 600).save(str(path))
    assert lint_spec(folder, tokenizer=path) == []
    write_documents(folder / "raw/ru/x.jsonl", [f"Привет, как дела? {i}" * 9 for i in range(40)])
    problem = only_problem(lint_spec(folder, tokenizer=path))
    assert (problem.rule, problem.subject, problem.severe) == ("fertility", "web/ru", False)
    assert problem.examples[0][0] == "web/ru ru"


def test_lint_reports_unknown_tokens(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    word_tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    word_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    word_tokenizer.save(str(folder / "tokenizer.json"))
    problems = lint_spec(folder, tokenizer=folder / "tokenizer.json")
    # The domain web/c has too few tokens for the rule, so it is not reported.
    assert {(p.rule, p.subject) for p in problems} == {("unknown-tokens", f"web/{name}") for name in "ab"}


def test_lint_sorts_errors_first(folder):
    write_documents(folder / "raw/a/web.jsonl", ["lost \ufffd"])
    write_lines(folder / "raw/c/torn.jsonl", [b"{torn"])
    (folder / "raw/x.md").write_text("about")
    assert [p.severe for p in lint_spec(folder)] == [True, False, False]
