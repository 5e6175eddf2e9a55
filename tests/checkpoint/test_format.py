"""Tests of checkpoint files, against torch's own reader and writer, and of slices, against full tensors."""

import io
import resource
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from mhmoe_ray.checkpoint import format as slices_module
from mhmoe_ray.checkpoint.format import Slice, read_into, stored_slices, write_slices
from mhmoe_ray.checkpoint.load import load_tensors, read_index
from mhmoe_ray.checkpoint.save import save_slices
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.storage import describe_file
from tests.support.saved import save_tensors

TENSORS = {
    "matrix": torch.arange(24.0).view(4, 6),
    "transposed": torch.arange(24.0).view(6, 4).T,
    "experts": torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)),
    "scalar": torch.tensor(3.5),
    "half": torch.arange(7).bfloat16(),
    "count": torch.arange(5),
    "none": torch.empty(0, 3),
}


def empty_copies(tensors):
    """Return tensors of the same shapes and dtypes, filled with -1."""
    return {name: torch.full_like(t, -1) for name, t in tensors.items()}


def assert_same(actual, expected):
    assert all(torch.equal(actual[name], t) for name, t in expected.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torch_reads_our_files(tmp_path):
    save_tensors(tmp_path / "weights", TENSORS)
    # The scalar is left out, because torch's reader slices each tensor, which fails for a scalar.
    loaded = empty_copies({name: t for name, t in TENSORS.items() if t.ndim})
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path / "weights")), no_dist=True)
    assert_same(loaded, {name: TENSORS[name] for name in loaded})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_we_read_torchs_files(tmp_path):
    writer = HuggingFaceStorageWriter(str(tmp_path / "weights"), save_distributed=True)
    dcp.save({name: t.contiguous() for name, t in TENSORS.items()}, storage_writer=writer, no_dist=True)
    loaded = empty_copies(TENSORS)
    load_tensors(tmp_path / "weights", loaded)
    assert_same(loaded, TENSORS)
    assert {s.dtype for s in read_index(tmp_path / "weights")["half"]} == {torch.bfloat16}


def test_scalar_is_read_as_tensor_of_one_element(tmp_path):
    """A checkpoint may have a temperature as a scalar, while the model has it as a parameter of one element."""
    save_tensors(tmp_path / "weights", TENSORS)
    loaded = {"scalar": torch.zeros(1)}
    load_tensors(tmp_path / "weights", loaded)
    assert loaded["scalar"].tolist() == [3.5]


def test_write_slices_returns_the_files_entry(tmp_path):
    """The entry has the size and the hash that `describe_file` computes from the written file."""
    with (tmp_path / "x").open("wb") as file:
        entry = write_slices(file, {name: Slice(t, (0,) * t.ndim, tuple(t.shape)) for name, t in TENSORS.items()})
    assert entry == describe_file(tmp_path / "x")


def draw_cuts(length, draw):
    """Draw positions that cut a dimension into parts, 0 and `length` included, in order."""
    inner = draw(st.lists(st.integers(0, length), max_size=3))
    return sorted({0, length, *inner})


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from([1, 40, 1 << 20]))
def test_any_slice_is_read_from_any_blocks(data, shape, piece):
    """Read a random slice of a tensor, as float32 or float64, from files that have one block of the tensor each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices_module, "PIECE_BYTES", piece)
        full_tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
        edges = [draw_cuts(n, data.draw) for n in shape]
        boxes = [[]]
        for dimension_edges in edges:
            boxes = [[*box, span] for box in boxes for span in pairwise(dimension_edges)]
        files = []
        for box in boxes:
            file = io.BytesIO()
            local = full_tensor[tuple(slice(a, b) for a, b in box)]
            write_slices(file, {"t": Slice(local, tuple(a for a, _ in box), tuple(shape))})
            files.append(file)
        target_box = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
        target = torch.full(
            [b - a for a, b in target_box], -1.0, dtype=data.draw(st.sampled_from([torch.float32, torch.float64]))
        )
        filled = 0
        for file in files:
            filled += read_into(
                Slice(target, tuple(a for a, _ in target_box), tuple(shape)), read_stored_slice(file), file
            )
        assert filled == target.numel()
        assert torch.equal(target.float(), full_tensor[tuple(slice(a, b) for a, b in target_box)])


def read_stored_slice(file):
    """Return the description of the slice of tensor "t" that an in-memory file has."""

    class Opened(io.BytesIO):
        """Stand-in for a path whose file is in memory."""

        def open(self, _mode):
            return io.BytesIO(file.getvalue())

        def stat(self):
            return type("Stat", (), {"st_size": len(file.getvalue())})

    return stored_slices(Opened())["t"]


def test_incomplete_tensor_is_rejected(tmp_path):
    save_slices(tmp_path / "weights", {"t": Slice(torch.zeros(2, 3), (0, 0), (4, 3))}, 0)
    save_slices(tmp_path / "weights", {"t": Slice(torch.zeros(1, 3), (3, 0), (4, 3))}, 1)
    with pytest.raises(CheckpointError, match="a part of t is not in it"):
        load_tensors(tmp_path / "weights", {"t": torch.empty(4, 3)})


def test_more_files_are_read_than_may_be_open(tmp_path):
    """A tensor in 200 files can be loaded by a process that may open 50 more files at a time."""
    ranks = 200
    for rank in range(ranks):
        save_slices(tmp_path, {"t": Slice(torch.full((1, 2), float(rank)), (rank, 0), (ranks, 2))}, rank)
    loaded = {"t": torch.empty(ranks, 2)}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_count = sum(1 for _ in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_count + ranks // 4, limits[1]))
    try:
        load_tensors(tmp_path, loaded)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert torch.equal(loaded["t"][:, 1], torch.arange(float(ranks)))


def test_checkpoint_removed_while_loading_is_reported(tmp_path):
    folder = tmp_path / "step" / "weights"
    save_tensors(folder, TENSORS)
    index = read_index(folder)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="step: it was removed while it was read"):
        load_tensors(folder, empty_copies(TENSORS), index=index)


@pytest.mark.parametrize("content", [b"", b"no header", b"\xff" * 64, (2).to_bytes(8, "little") + b"{]"])
def test_file_that_is_no_safetensors_file_is_reported(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read"):
        load_tensors(tmp_path, {"t": torch.empty(1)})


def test_file_is_never_written_twice(tmp_path):
    save_tensors(tmp_path / "weights", TENSORS)
    with pytest.raises(FileExistsError):
        save_tensors(tmp_path / "weights", TENSORS)
