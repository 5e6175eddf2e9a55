"""Surveys by jobs of a real cluster equal those made by reading file after file."""

import pytest

from mhmoe_ray.data.inspect.result import SurveyRequest
from tests.data.inspect.surveys import survey_serially
from tests.data.prepare.test_prepare import on_cluster
from tests.data.sources.read import data_spec
from tests.data.texts import documents, write_corpus, write_documents, write_lines
from tests.llama_tokenizer import llama_tokenizer

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def request_and_expected(tmp_path_factory):
    """Write a corpus with copies, damaged texts and unreadable lines; return the request for a survey and the expected
    survey."""
    folder = tmp_path_factory.mktemp("corpus")
    copied = documents("copied", 9)
    write_corpus(folder / "raw")
    write_documents(folder / "raw/a/again.jsonl.zst", [*copied, *copied[:4], "lost \ufffd"])
    write_documents(folder / "raw/de/again.jsonl", [*copied[2:], "Fa\ufffd <s>"])
    write_lines(folder / "raw/de/torn.jsonl", [b"{torn", b'{"text": "", "language": "fr"}'])
    llama_tokenizer(copied, 400).save(str(folder / "tokenizer.json"))
    spec = data_spec(folder / "raw")
    request = SurveyRequest(data=spec, tokenizer=folder / "tokenizer.json", rules=True)
    return request, survey_serially(spec, folder / "tokenizer.json")


@pytest.mark.parametrize(
    "module",
    [
        ["mhmoe_ray.data.inspect.job"],
        pytest.param(["tests.data.inspect.survey_otherwise", "serially"], marks=pytest.mark.slow),
        # Starts a shuffle's actors.
        pytest.param(["tests.data.inspect.survey_otherwise", "in-partitions"], marks=pytest.mark.slow),
    ],
    ids=["in-parallel", "serially", "in-partitions"],
)
def test_however_it_is_made(request_and_expected, local_cluster, module):
    request, expected = request_and_expected
    assert expected.copies.extra == 4 + 7
    lines = on_cluster(local_cluster, *module, **request.environment)
    assert request.result(lambda: "\n".join(lines)) == expected
    told = [line for line in lines if line.startswith("inspect: ")]
    assert told[0].startswith("inspect: reading 7 files")
    assert "inspect: read 7 of 7 files" in told
