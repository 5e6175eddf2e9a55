from mhmoe_ray.data.shards.verify import problem_with
from mhmoe_ray.runs.manifest import describe_file


def test_a_file_is_what_was_written_or_the_problem_is_told(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("one")
    sha256 = describe_file(path).sha256
    assert problem_with(path, sha256) is None
    path.write_text("two")
    assert problem_with(path, sha256) == "its content is not what was written"
    path.unlink()
    assert problem_with(path, sha256) == "it is missing"
