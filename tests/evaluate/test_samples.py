"""Samples made of raw text."""

from mhmoe_ray.data.sources import Reading
from mhmoe_ray.data.tokenizer import DocumentEncoder
from mhmoe_ray.evaluate import measure
from mhmoe_ray.evaluate.measure import of_text
from tests.data.sources.read import data_spec
from tests.serve.conftest import build_tokenizer


def test_no_file_of_a_domain_that_has_its_samples_is_opened(tmp_path, monkeypatch):
    opened = []

    def reading(file, data):
        opened.append(file.path.rpartition("/")[2])
        return Reading(file, data)

    monkeypatch.setattr(measure, "Reading", reading)
    for name in ("a/1", "a/2", "a/3", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text("the cat sat on the mat " * (1 if name == "a/1" else 50))
    found = list(of_text(data_spec(tmp_path), DocumentEncoder(build_tokenizer()), 16, 4))
    assert [domain.tokens.shape for domain in found] == [(4, 17)] * 2
    assert opened == ["1.txt", "2.txt", "1.txt"]
