# ruff: noqa: RUF001 - characters of many scripts

"""Figures of a corpus against plain counting, whatever the files that its documents are in."""

import base64
import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.inspect.figures import EXAMPLES, Figures, Place, total
from mhmoe_ray.data.inspect.result import SurveyRequest
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.sources import Reason
from mhmoe_ray.data.tokenizer import DocumentEncoder, store_given
from mhmoe_ray.errors import DataError
from tests.data.inspect.surveys import histogram, survey_serially
from tests.data.sources.read import data_spec
from tests.data.texts import documents, write_corpus, write_documents, write_lines
from tests.llama_tokenizer import llama_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    made = llama_tokenizer(documents("train", 20), 400)
    made.save(str(path := tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))
    return made, path


def test_figures_of_a_corpus(tmp_path, tokenizer):
    texts = write_corpus(tmp_path / "raw")
    spec, (encoder, path) = data_spec(tmp_path / "raw"), tokenizer
    found = survey_serially(spec, path)
    assert found.domains.keys() == texts.keys()
    for name, domain in found.domains.items():
        mine, whole = texts[name], domain.whole
        tokens = [len(encoder.encode(text, add_special_tokens=False).ids) for text in mine]
        assert whole.documents == len(mine)
        assert whole.bytes == sum(len(text.encode()) for text in mine)
        assert whole.characters == sum(map(len, mine))
        assert whole.words == sum(len(text.split()) for text in mine)
        assert whole.held_out == sum(is_validation(text, spec.validation_fraction) for text in mine)
        assert whole.tokens == sum(tokens)
        assert whole.lengths == histogram(map(len, mine))
        assert whole.token_lengths == histogram(tokens)
        assert whole.longest == max(map(len, mine))
        stored = [file.stat().st_size for file in (tmp_path / "raw" / name[-1]).iterdir()]
        assert (domain.files, domain.stored_bytes) == (len(stored), sum(stored))
    longest = max(texts["web/b"], key=len)
    place = Place(str(tmp_path / "raw/b/three.jsonl.gz"), texts["web/b"].index(longest) + 1)
    assert found.domains["web/b"].whole.longest_at == place


def test_tokens_are_counted_as_preparing_encodes_them(tmp_path, tokenizer):
    """Letters that spell a special token are encoded as letters."""
    texts = ["<s>struck</s> out", "nothing special", "</s>"]
    write_documents(tmp_path / "raw" / "x.jsonl", texts)
    made, path = tokenizer
    whole = survey_serially(data_spec(tmp_path / "raw"), path).domains["web/all"].whole
    prepared = sum(map(len, DocumentEncoder(made).encode(texts)))
    assert whole.tokens + whole.documents == prepared
    assert whole.tokens > sum(len(made.encode(text, add_special_tokens=False).ids) for text in texts)


def test_a_vocabulary_in_tiktokens_format_counts_as_it_does_prepared(tmp_path):
    write_corpus(tmp_path / "raw")
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (tmp_path / "ranks.tiktoken").write_text("".join(lines))
    given = {"tokenizer": tmp_path / "ranks.tiktoken", "tokenizer_pattern": "gpt2"}
    spec = data_spec(tmp_path / "raw").model_copy(update=given)
    store_given(spec, 300, tmp_path / "tokenizer.json")
    found = survey_serially(spec, spec.tokenizer)
    assert found == survey_serially(spec, tmp_path / "tokenizer.json")
    assert found.domains["web/a"].whole.tokens < found.domains["web/a"].whole.bytes
    otherwise = spec.model_copy(update={"tokenizer_pattern": "[a-z]|[^a-z]"})  # the file is open with gpt2's
    a_byte_each = survey_serially(otherwise, spec.tokenizer).domains["web/a"].whole
    assert a_byte_each.tokens == a_byte_each.bytes
    with pytest.raises(DataError, match=r"set data\.tokenizer_pattern to gpt2"):
        survey_serially(data_spec(tmp_path / "raw"), spec.tokenizer)


DOCUMENTS = st.lists(st.tuples(st.sampled_from("ab c\né漢"), st.integers(1, 70), st.integers(0, 3)), max_size=12)


@given(DOCUMENTS.filter(bool))
def test_no_split_over_files_shows(tokenizer, drawn):
    """The same documents give the same figures in one file and in up to four."""
    texts = [f"{character * length}." for character, length, _ in drawn]
    with tempfile.TemporaryDirectory() as folder:
        write_documents(Path(folder) / "one" / "all.jsonl", texts)
        for file in {number for *_, number in drawn}:
            chosen = [text for text, (*_, number) in zip(texts, drawn, strict=True) if number == file]
            write_documents(Path(folder) / "four" / f"{file}.jsonl", chosen)
        one, four = (survey_serially(data_spec(f"{folder}/{part}"), tokenizer[1]) for part in ("one", "four"))
    mine, others = (s.domains["web/all"].whole for s in (one, four))
    mine.longest_at = others.longest_at = None
    assert mine == others
    assert (one.copies.domains, one.copies.extra) == (four.copies.domains, four.copies.extra)
    assert [n for n, *_ in one.copies.most] == [n for n, *_ in four.copies.most]
    counts = [{rule: f.count for rule, f in s.domains["web/all"].findings.items()} for s in (one, four)]
    assert counts[0] == counts[1]


def figures(texts, path) -> Figures:
    made = Figures()
    for line, text in enumerate(texts, start=1):
        made.count(text, len(text.encode()), len(text.split()), len(text) // 3, len(text) % 2 == 0, Place(path, line))
    return made


@given(st.lists(st.lists(st.text(), max_size=4), max_size=5), st.randoms())
def test_sums_do_not_depend_on_order_or_grouping(groups, random):
    parts = [figures(texts, f"/{i}") for i, texts in enumerate(groups)]
    expected = total(parts)
    random.shuffle(parts)
    cut = random.randint(0, len(parts))
    assert total([total(parts[:cut]), total(parts[cut:])]) == expected


def test_languages_of_records_and_of_folders(tmp_path):
    def record(**keys):
        return json.dumps({"text": "some text", **keys}).encode()

    write_lines(tmp_path / "de" / "x.jsonl", [record(), record(language="DE"), record(meta={"language": "french"})])
    write_lines(tmp_path / "book" / "x.jsonl", [record(), record(meta={"language": [{"name": "C"}]})])
    found = survey_serially(data_spec(tmp_path)).domains
    assert {name: f.documents for name, f in found["web/de"].languages.items()} == {"de": 2, "fr": 1}
    assert {name: f.documents for name, f in found["web/book"].languages.items()} == {"": 2}


def test_what_cannot_be_read_keeps_its_place(tmp_path):
    good = json.dumps({"text": "fine"}).encode()
    write_lines(tmp_path / "x.jsonl", [good, b"{torn", good, b'{"text": ""}', *[b"[]"] * (EXAMPLES + 2)])
    domain = survey_serially(data_spec(tmp_path)).domains["web/all"]
    assert domain.quarantined == Counter({Reason.NOT_JSON: 1, Reason.EMPTY: 1, Reason.NO_TEXT: EXAMPLES + 2})
    [(place, _)] = domain.findings[Reason.NOT_JSON].examples
    assert place == Place(str(tmp_path / "x.jsonl"), 2)
    lists = domain.findings[Reason.NO_TEXT]
    assert (lists.count, [place.line for place, _ in lists.examples]) == (EXAMPLES + 2, [5, 6, 7])


def test_unknown_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "moon": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    write_documents(tmp_path / "raw" / "x.jsonl", ["the moon over the sea", "moon"])
    whole = survey_serially(data_spec(tmp_path / "raw"), tmp_path / "tokenizer.json").domains["web/all"].whole
    assert (whole.tokens, whole.unknown) == (6, 2)


def test_fertility():
    spaced = Figures(documents=1, bytes=120, characters=100, words=20, tokens=30)
    assert (spaced.bytes_per_token, spaced.tokens_per_character, spaced.tokens_per_word) == (4, 0.3, 1.5)
    unspaced = Figures(documents=1, bytes=300, characters=100, words=4, unspaced=90, tokens=60)
    assert (unspaced.tokens_per_character, unspaced.tokens_per_word) == (0.6, None)
    assert Figures(documents=1, bytes=9, characters=9, words=2).bytes_per_token is None


@pytest.mark.parametrize(
    ("text", "spaced"),
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
def test_scripts_without_spaces_between_words(text, spaced):
    figures = Figures()
    figures.count(text, len(text.encode()), len(text.split()), 7, False, Place("/x", 1))
    assert figures.tokens_per_word == (7 / len(text.split()) if spaced else None)


def test_a_survey_comes_back_from_a_log(tmp_path, tokenizer, capsys):
    write_corpus(tmp_path)
    write_documents(tmp_path / "a" / "more.jsonl", ["same", "same", "é\u2028漢 <html>"])
    write_lines(tmp_path / "a" / "torn.jsonl", [b"{"])
    found = survey_serially(data_spec(tmp_path), tokenizer[1])
    request = SurveyRequest(data=data_spec(tmp_path), tokenizer=None, rules=False)
    request.answer(found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 10_000
    assert request.result(lambda: "\n".join(["before", *lines, "after"])) == found
    assert request.result(lambda: "nothing\n") is None
