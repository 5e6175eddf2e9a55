# ruff: noqa: RUF001 - characters of many scripts

"""Tests that a survey's statistics of a corpus equal plain counts, however the documents are split over files."""

import base64
import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.inspect.figures import EXAMPLES, Figures, TextLocation, sum_figures
from mhmoe_ray.data.inspect.result import SurveyRequest
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.sources import Reason
from mhmoe_ray.data.tokenizer import DocumentEncoder, store_given_tokenizer
from mhmoe_ray.errors import DataError
from tests.data.inspect.surveys import make_histogram, survey_serially
from tests.data.sources.read import data_spec
from tests.data.texts import make_documents, write_corpus, write_documents, write_lines
from tests.support.llama_tokenizer import llama_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Train a LLaMA-like tokenizer; return it and the path of its file."""
    llama = llama_tokenizer(make_documents("train", 20), 400)
    llama.save(str(path := tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))
    return llama, path


def test_survey_figures_equal_plain_counting(tmp_path, tokenizer):
    texts = write_corpus(tmp_path / "raw")
    spec, (encoder, path) = data_spec(tmp_path / "raw"), tokenizer
    survey = survey_serially(spec, path)
    assert survey.domains.keys() == texts.keys()
    for name, domain in survey.domains.items():
        domain_texts, all_figures = texts[name], domain.all_figures
        tokens = [len(encoder.encode(text, add_special_tokens=False).ids) for text in domain_texts]
        assert all_figures.documents == len(domain_texts)
        assert all_figures.bytes == sum(len(text.encode()) for text in domain_texts)
        assert all_figures.characters == sum(map(len, domain_texts))
        assert all_figures.words == sum(len(text.split()) for text in domain_texts)
        assert all_figures.held_out == sum(is_validation(text, spec.validation_fraction) for text in domain_texts)
        assert all_figures.tokens == sum(tokens)
        assert all_figures.lengths == make_histogram(map(len, domain_texts))
        assert all_figures.token_lengths == make_histogram(tokens)
        assert all_figures.longest == max(map(len, domain_texts))
        stored = [file.stat().st_size for file in (tmp_path / "raw" / name[-1]).iterdir()]
        assert (domain.files, domain.stored_bytes) == (len(stored), sum(stored))
    longest_text = max(texts["web/b"], key=len)
    location = TextLocation(str(tmp_path / "raw/b/three.jsonl.gz"), texts["web/b"].index(longest_text) + 1)
    assert survey.domains["web/b"].all_figures.longest_at == location


def test_survey_counts_tokens_like_the_preparation(tmp_path, tokenizer):
    """The survey counts as many tokens as preparation writes: both encode the text of a special token as plain text."""
    texts = ["<s>struck</s> out", "nothing special", "</s>"]
    write_documents(tmp_path / "raw" / "x.jsonl", texts)
    llama, path = tokenizer
    all_figures = survey_serially(data_spec(tmp_path / "raw"), path).domains["web/all"].all_figures
    encoded_length = sum(map(len, DocumentEncoder(llama).encode(texts)))
    assert all_figures.tokens + all_figures.documents == encoded_length
    assert all_figures.tokens > sum(len(llama.encode(text, add_special_tokens=False).ids) for text in texts)


def test_survey_with_a_tiktoken_file_equals_that_with_its_tokenizer(tmp_path):
    write_corpus(tmp_path / "raw")
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (tmp_path / "ranks.tiktoken").write_text("".join(lines))
    tokenizer_keys = {"tokenizer": tmp_path / "ranks.tiktoken", "tokenizer_pattern": "gpt2"}
    spec = data_spec(tmp_path / "raw").model_copy(update=tokenizer_keys)
    store_given_tokenizer(spec, 300, tmp_path / "tokenizer.json")
    survey = survey_serially(spec, spec.tokenizer)
    assert survey == survey_serially(spec, tmp_path / "tokenizer.json")
    assert survey.domains["web/a"].all_figures.tokens < survey.domains["web/a"].all_figures.bytes
    # The process has cached the tokenizer of this file with another pattern, which must not be used here.
    byte_spec = spec.model_copy(update={"tokenizer_pattern": "[a-z]|[^a-z]"})
    byte_figures = survey_serially(byte_spec, spec.tokenizer).domains["web/a"].all_figures
    assert byte_figures.tokens == byte_figures.bytes
    with pytest.raises(DataError, match=r"set data\.tokenizer_pattern to gpt2"):
        survey_serially(data_spec(tmp_path / "raw"), spec.tokenizer)


DOCUMENTS = st.lists(st.tuples(st.sampled_from("ab c\né漢"), st.integers(1, 70), st.integers(0, 3)), max_size=12)


@given(DOCUMENTS.filter(bool))
def test_survey_is_independent_of_the_split_over_files(tokenizer, documents):
    """The same documents have the same statistics in one file and in up to four files."""
    texts = [f"{character * length}." for character, length, _ in documents]
    with tempfile.TemporaryDirectory() as folder:
        write_documents(Path(folder) / "one" / "all.jsonl", texts)
        for file in {number for *_, number in documents}:
            file_texts = [text for text, (*_, number) in zip(texts, documents, strict=True) if number == file]
            write_documents(Path(folder) / "four" / f"{file}.jsonl", file_texts)
        single_file_survey, split_survey = (
            survey_serially(data_spec(f"{folder}/{part}"), tokenizer[1]) for part in ("one", "four")
        )
    single_file_figures, split_figures = (s.domains["web/all"].all_figures for s in (single_file_survey, split_survey))
    single_file_figures.longest_at = split_figures.longest_at = None
    assert single_file_figures == split_figures
    assert (single_file_survey.copies.domains, single_file_survey.copies.extra) == (
        split_survey.copies.domains,
        split_survey.copies.extra,
    )
    assert [n for n, *_ in single_file_survey.copies.most_copied] == [n for n, *_ in split_survey.copies.most_copied]
    counts = [
        {rule: f.count for rule, f in s.domains["web/all"].findings.items()} for s in (single_file_survey, split_survey)
    ]
    assert counts[0] == counts[1]


def make_figures(texts, path) -> Figures:
    result = Figures()
    for line, text in enumerate(texts, start=1):
        result.add_document(
            text, len(text.encode()), len(text.split()), len(text) // 3, len(text) % 2 == 0, TextLocation(path, line)
        )
    return result


@given(st.lists(st.lists(st.text(), max_size=4), max_size=5), st.randoms())
def test_sum_figures_is_independent_of_order_and_grouping(groups, random):
    parts = [make_figures(texts, f"/{i}") for i, texts in enumerate(groups)]
    expected = sum_figures(parts)
    random.shuffle(parts)
    cut = random.randint(0, len(parts))
    assert sum_figures([sum_figures(parts[:cut]), sum_figures(parts[cut:])]) == expected


def test_survey_counts_languages_of_records_and_folders(tmp_path):
    def record(**keys):
        return json.dumps({"text": "some text", **keys}).encode()

    write_lines(tmp_path / "de" / "x.jsonl", [record(), record(language="DE"), record(meta={"language": "french"})])
    write_lines(tmp_path / "book" / "x.jsonl", [record(), record(meta={"language": [{"name": "C"}]})])
    survey = survey_serially(data_spec(tmp_path)).domains
    assert {name: f.documents for name, f in survey["web/de"].languages.items()} == {"de": 2, "fr": 1}
    assert {name: f.documents for name, f in survey["web/book"].languages.items()} == {"": 2}


def test_survey_names_the_location_of_bad_lines(tmp_path):
    good = json.dumps({"text": "fine"}).encode()
    write_lines(tmp_path / "x.jsonl", [good, b"{torn", good, b'{"text": ""}', *[b"[]"] * (EXAMPLES + 2)])
    domain = survey_serially(data_spec(tmp_path)).domains["web/all"]
    assert domain.quarantined == Counter({Reason.NOT_JSON: 1, Reason.EMPTY: 1, Reason.NO_TEXT: EXAMPLES + 2})
    [(location, _)] = domain.findings[Reason.NOT_JSON].examples
    assert location == TextLocation(str(tmp_path / "x.jsonl"), 2)
    not_objects = domain.findings[Reason.NO_TEXT]
    assert (not_objects.count, [location.line for location, _ in not_objects.examples]) == (EXAMPLES + 2, [5, 6, 7])


def test_survey_of_conversations_counts_the_contents_of_their_messages(tmp_path):
    messages = [{"role": "user", "content": "the quiet sea"}, {"role": "assistant", "content": "a boat"}]
    records = [{"messages": messages}, {"messages": messages[:1]}, {"prompt": "hi", "completion": "and \ufffd"}]
    write_lines(tmp_path / "de/a.jsonl", [json.dumps(record).encode() for record in records])
    survey = survey_serially(data_spec(tmp_path, format="chat")).domains["web/de"]
    figures = survey.all_figures
    assert (figures.documents, figures.words) == (2, 5 + 3)
    assert figures.characters == len("the quiet sea\na boat") + len("hi\nand \ufffd")
    assert survey.quarantined == {str(Reason.NO_CONVERSATION): 1}
    [(location, detail)] = survey.findings[Reason.NO_CONVERSATION].examples
    assert (str(location), detail) == (f"{tmp_path}/de/a.jsonl:2", "it has no message of the role assistant")


def test_survey_counts_unknown_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    word_tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "moon": 2}, unk_token="<unk>"))
    word_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    word_tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_documents(tmp_path / "raw" / "x.jsonl", ["the moon over the sea", "moon"])
    all_figures = (
        survey_serially(data_spec(tmp_path / "raw"), tmp_path / "tokenizer.json").domains["web/all"].all_figures
    )
    assert (all_figures.tokens, all_figures.unknown) == (6, 2)


def test_figures_per_token_of_spaced_and_unspaced_text():
    spaced_figures = Figures(documents=1, bytes=120, characters=100, words=20, tokens=30)
    assert (spaced_figures.bytes_per_token, spaced_figures.tokens_per_character, spaced_figures.tokens_per_word) == (
        4,
        0.3,
        1.5,
    )
    unspaced_figures = Figures(documents=1, bytes=300, characters=100, words=4, unspaced=90, tokens=60)
    assert (unspaced_figures.tokens_per_character, unspaced_figures.tokens_per_word) == (0.6, None)
    assert Figures(documents=1, bytes=9, characters=9, words=2).bytes_per_token is None


@pytest.mark.parametrize(
    ("text", "has_spaces"),
    [
        ("The moon rises over a quiet sea.", True),
        ("Der Mond über dem Meer – 漢字", True),
        ("달이 바다 위로 떠오른다", True),
        ("चाँद समुद्र के ऊपर उगता है", True),
        ("月は静かな海の上に昇る", False),
        ("月亮从海上升起 over the sea", False),
        ("ดวงจันทร์ขึ้นเหนือทะเล", False),
        ("ព្រះចន្ទរះលើសមុទ្រ", False),
        ("ཟླ་བ་མཚོ་ལས་ཤར", False),
    ],
)
def test_tokens_per_word_is_none_for_scripts_without_spaces(text, has_spaces):
    text_figures = Figures()
    text_figures.add_document(text, len(text.encode()), len(text.split()), 7, False, TextLocation("/x", 1))
    assert text_figures.tokens_per_word == (7 / len(text.split()) if has_spaces else None)


def test_request_reads_its_survey_from_a_log(tmp_path, tokenizer, capsys):
    write_corpus(tmp_path)
    write_documents(tmp_path / "a" / "more.jsonl", ["same", "same", "é\u2028漢 <html>"])
    write_lines(tmp_path / "a" / "torn.jsonl", [b"{"])
    survey = survey_serially(data_spec(tmp_path), tokenizer[1])
    request = SurveyRequest(data=data_spec(tmp_path), tokenizer=None, rules=False)
    request.answer(survey)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 10_000
    assert request.result(lambda: "\n".join(["before", *lines, "after"])) == survey
    assert request.result(lambda: "nothing\n") is None
