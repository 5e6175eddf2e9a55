import os

import pytest

from mhmoe_ray.storage import describe_file

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_hashes_from_several_nodes_are_correct_and_in_order(nodes, tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(13)]
    for i, file in enumerate(files):
        file.write_bytes(os.urandom(1000 + i))
    entries, tasks = nodes.ask("describe", [str(file) for file in files])
    assert entries == [describe_file(file).model_dump() for file in files]
    assert tasks == 9  # one for each of the eight nodes, and one for the head
    assert nodes.ask("describe", [])[0] == []
