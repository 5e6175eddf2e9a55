import os

import pytest

from mhmoe_ray.storage import describe_file

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_hashes_that_several_nodes_find_are_those_of_the_files_in_order(nodes, tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(13)]
    for i, file in enumerate(files):
        file.write_bytes(os.urandom(1000 + i))
    entries, tasks = nodes.ask("describe", [str(file) for file in files])
    assert entries == [describe_file(file).model_dump() for file in files]
    assert tasks == 5  # of the four that this test started and the head
    assert nodes.ask("describe", [])[0] == []
