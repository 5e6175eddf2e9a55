from pathlib import Path

import pytest

from mhmoe_ray.runs.layout import RunDir
from tests.data.texts import write_corpus
from tests.faults import harness
from tests.watch import wait_for_the_end


@pytest.fixture(scope="session")
def project(tmp_path_factory, local_cluster) -> Path:
    """A folder with raw text; the first run in it prepares the data for all."""
    folder = tmp_path_factory.mktemp("faults")
    write_corpus(folder / "raw")
    return folder


@pytest.fixture(scope="session")
def reference(project) -> RunDir:
    """A run of 120 steps that nobody hurt."""
    harness.spec_in(project, train={"steps": 120})
    run = harness.submit(project)
    wait_for_the_end(run)
    return run
