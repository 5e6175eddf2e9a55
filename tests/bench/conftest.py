"""Fixtures of the benchmark tests, whose sizes are too small for the measurements to mean anything."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mhmoe_ray.spec import RunSpec, dump_spec
from tests.cli.run import mhmoe
from tests.data.texts import write_corpus
from tests.support.specs import tiny_spec


@pytest.fixture(autouse=True)
def _single_thread() -> Iterator[None]:
    """Run each test with one torch thread.

    The layers are so small that threads would mostly wait for each other, on a busy machine for seconds.
    """
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous_threads)


@pytest.fixture(scope="session")
def project(local_cluster, tmp_path_factory) -> Path:
    """Write a corpus and a spec of 20 steps, prepare the data, and return the folder of all three."""
    folder = tmp_path_factory.mktemp("bench")
    write_corpus(folder / "raw")
    write_spec(folder)
    assert mhmoe(folder, "data", "prepare", "spec.yaml").code == 0
    return folder


def write_spec(folder: Path) -> RunSpec:
    """Write spec.yaml and the tokenizer file that it names, whose tokens are the 256 bytes; return the spec."""
    (folder / "ranks").write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    data = {"validation_fraction": 0.2, "tokenizer": "ranks", "tokenizer_pattern": "gpt2"}
    spec = tiny_spec(folder, data=data)
    (folder / "spec.yaml").write_text(dump_spec(spec))
    return spec
