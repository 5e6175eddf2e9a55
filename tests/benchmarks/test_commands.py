import pytest

from tests.bench.conftest import write_spec
from tests.benchmarks.process import run_benchmark


@pytest.mark.long
def test_help_and_status_of_a_long_run_are_timed(tmp_path):
    write_spec(tmp_path)
    options = ("--no-submit", "--lines", "3000", "--rounds", "1", "--json")
    result = run_benchmark(tmp_path, "commands", "spec.yaml", *options)
    data = result.json()
    assert data["lines"] == 3000
    assert len(data["help"]) == len(data["status"]) == 1
    assert min(*data["help"], *data["status"]) > 0
    assert data["submit"] == []
    assert "mhmoe status, 3,000 lines" in result.err
