import platform

import pytest
import torch

from mhmoe_ray.bench import timing
from mhmoe_ray.errors import SpecError


def test_the_processors_name_is_the_systems_without_its_marks(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Maker(R) Chip(TM)  9000  CPU\nflags\t: a b\nmodel name\t: other\n"
    )
    assert timing.cpu_name(cpuinfo) == "Maker Chip 9000 CPU"
    assert timing.cpu_name(tmp_path / "none") == platform.machine()


def test_a_cpu_has_threads():
    found = timing.find("cpu")
    assert found.as_json() == {"device": "cpu", "machine": found.name, "threads": torch.get_num_threads()}
    assert str(found) == f"{found.name}, {torch.get_num_threads()} threads"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_no_card_is_one_line():
    with pytest.raises(SpecError, match="finds no card; use --device cpu"):
        timing.find("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_card_has_its_name():
    found = timing.find("cuda")
    assert found.as_json() == {"device": "cuda", "machine": torch.cuda.get_device_name(), "threads": None}
