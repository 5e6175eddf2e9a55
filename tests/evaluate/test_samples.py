"""Tests of samples of raw text."""

from mhmoe_ray.data.sources import FileReader
from mhmoe_ray.data.tokenizer import DocumentEncoder
from mhmoe_ray.evaluate import measure
from mhmoe_ray.evaluate.measure import text_samples
from tests.data.sources.read import data_spec
from tests.serve.conftest import build_tokenizer


def test_text_samples_opens_no_more_files_than_needed(tmp_path, monkeypatch):
    opened_names = []

    def read_file(file, data):
        opened_names.append(file.path.rpartition("/")[2])
        return FileReader(file, data)

    monkeypatch.setattr(measure, "FileReader", read_file)
    for name in ("a/1", "a/2", "a/3", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text("the cat sat on the mat " * (1 if name == "a/1" else 50))
    domains = list(text_samples(data_spec(tmp_path), DocumentEncoder(build_tokenizer()), 16, 4))
    assert [domain.tokens.shape for domain in domains] == [(4, 17)] * 2
    assert opened_names == ["1.txt", "2.txt", "1.txt"]
