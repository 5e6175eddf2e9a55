import platform

import pytest
import torch

from mhmoe_ray.bench import timing
from mhmoe_ray.errors import SpecError


def test_cpu_name_has_no_trademarks(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Maker(R) Chip(TM)  9000  CPU\nflags\t: a b\nmodel name\t: other\n"
    )
    assert timing.cpu_name(cpuinfo) == "Maker Chip 9000 CPU"
    assert timing.cpu_name(tmp_path / "none") == platform.machine()


def test_cpu_has_thread_count():
    hardware = timing.find_hardware("cpu")
    assert hardware.as_json() == {"device": "cpu", "machine": hardware.name, "threads": torch.get_num_threads()}
    assert str(hardware) == f"{hardware.name}, {torch.get_num_threads()} threads"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_missing_card_is_one_line():
    with pytest.raises(SpecError, match="finds no card; use --device cpu"):
        timing.find_hardware("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_card_has_name():
    hardware = timing.find_hardware("cuda")
    assert hardware.as_json() == {"device": "cuda", "machine": torch.cuda.get_device_name(), "threads": None}
