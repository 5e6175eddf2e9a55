"""Tests that surveys by jobs of a real cluster equal serial surveys."""

import pytest

from mhmoe_ray.data.inspect.result import SurveyRequest
from tests.data.inspect.surveys import survey_serially
from tests.data.sources.read import data_spec
from tests.data.texts import make_documents, write_corpus, write_documents, write_lines
from tests.support.cluster_jobs import run_on_cluster
from tests.support.llama_tokenizer import llama_tokenizer

# test_reading.py has quick tests of serial surveys, and tests/cli/test_inspect.py has quick tests of the job.
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def request_and_expected(tmp_path_factory):
    """Write a corpus with copies and damage; return the request for its survey and the expected survey."""
    folder = tmp_path_factory.mktemp("corpus")
    copied_texts = make_documents("copied", 9)
    write_corpus(folder / "raw")
    write_documents(folder / "raw/a/again.jsonl.zst", [*copied_texts, *copied_texts[:4], "lost \ufffd"])
    write_documents(folder / "raw/de/again.jsonl", [*copied_texts[2:], "Fa\ufffd <s>"])
    write_lines(folder / "raw/de/torn.jsonl", [b"{torn", b'{"text": "", "language": "fr"}'])
    llama_tokenizer(copied_texts, 400).save(str(folder / "tokenizer.json"))
    spec = data_spec(folder / "raw")
    request = SurveyRequest(data=spec, tokenizer=folder / "tokenizer.json", rules=True)
    return request, survey_serially(spec, folder / "tokenizer.json")


@pytest.mark.parametrize(
    "module",
    [
        ["mhmoe_ray.data.inspect.job"],
        ["tests.data.inspect.survey_otherwise", "serially"],
        # With several partitions, the survey starts the actors of a shuffle.
        ["tests.data.inspect.survey_otherwise", "in-partitions"],
    ],
    ids=["in-parallel", "serially", "in-partitions"],
)
def test_survey_is_independent_of_parallelism(request_and_expected, local_cluster, module):
    request, expected = request_and_expected
    assert expected.copies.extra == 4 + 7
    lines = run_on_cluster(local_cluster, *module, **request.environment)
    assert request.result(lambda: "\n".join(lines)) == expected
    progress_lines = [line for line in lines if line.startswith("inspect: ")]
    assert progress_lines[0].startswith("inspect: reading 7 files")
    assert "inspect: read 7 of 7 files" in progress_lines
