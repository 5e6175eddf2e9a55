"""Tests of checkpoints on S3 whose transfers are reset, cut off, stalled or changed."""

from secrets import token_hex

import pytest
import torch

from mhmoe_ray.checkpoint.format import file_name, local_slice
from mhmoe_ray.checkpoint.load import load_model, load_verified_model
from mhmoe_ray.checkpoint.manifest import CheckpointManifest, checkpoint_name, commit, newest_checkpoint, read_manifest
from mhmoe_ray.checkpoint.save import save_slices
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location, ObjectPath
from tests.serving.conftest import SEQ_LEN, SPEC, build_model
from tests.support.proxy import Fault, FaultKind, FaultyProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MENDED_KINDS: list[FaultKind] = ["reset", "cut", "stall"]


@pytest.fixture(scope="module")
def weights():
    return build_model().named_tensors()


@pytest.fixture
def proxy(s3):
    """Return a proxy to the S3 server."""
    return FaultyProxy(int(s3[0].rpartition(":")[2]))


@pytest.fixture
def run(s3, proxy) -> RunDir:
    """Return a run directory that is reached through the proxy."""
    query = f"{s3[0].rpartition(':')[0]}:{proxy.port}"
    return RunDir(ObjectPath(f"s3://bucket/{token_hex(3)}/tiny-abc123?{query}"))


def save(run: RunDir, step: int, weights) -> Location:
    """Write a checkpoint as the only rank of a training does, and return it."""
    checkpoint = run.checkpoints / checkpoint_name(step, 1)
    entry = save_slices(checkpoint / "weights", {name: local_slice(t) for name, t in weights.items()}, rank=0)
    values = {"step": step, "tokens": 64, "position": 1, "seed": 7, "world": 1, "ep": 1, "model": SPEC}
    values |= {"seq_len": SEQ_LEN, "tokenizer_sha256": "", "data_sha256": ""}
    commit(checkpoint, CheckpointManifest(**values, files={f"weights/{file_name(0)}": entry}))
    return checkpoint


def assert_same_tensors(actual, expected) -> None:
    """Assert that tensors by their names are equal bit by bit."""
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


def assert_same_weights(checkpoint: Location, weights) -> None:
    """Assert that a checkpoint loads to these weights."""
    assert_same_tensors(load_model(checkpoint)[0].named_tensors(), weights)


@pytest.mark.parametrize("kind", MENDED_KINDS)
def test_an_upload_that_is_disturbed_is_repeated(proxy, run, weights, kind):
    proxy.disturb(Fault(kind, "PUT", "/weights/"), Fault(kind, "PUT", "/manifest.json"))
    checkpoint = save(run, 1, weights)
    assert proxy.pending_faults == []
    assert_same_weights(checkpoint, weights)


@pytest.mark.parametrize("kind", MENDED_KINDS)
def test_a_download_that_is_disturbed_is_repeated(proxy, run, weights, kind):
    checkpoint = save(run, 1, weights)
    proxy.disturb(Fault(kind, "GET", "/weights/"), Fault(kind, "GET", "/manifest.json"))
    manifest = read_manifest(checkpoint, ("weights",))
    assert proxy.pending_faults == []
    proxy.disturb(Fault(kind, "GET", "/weights/"))
    assert_same_tensors(load_verified_model(checkpoint, manifest).named_tensors(), weights)
    assert proxy.pending_faults == []


def test_a_bit_that_flips_during_an_upload_costs_only_that_checkpoint(proxy, run, weights):
    old_checkpoint = save(run, 1, weights)
    proxy.disturb(Fault("flip", "PUT", "/weights/"))
    checkpoint = save(run, 2, weights)
    with pytest.raises(CheckpointError, match="does not have the hash it was written with; use another checkpoint"):
        read_manifest(checkpoint)
    newest = newest_checkpoint(run)
    assert (newest.checkpoint, len(newest.skipped)) == (old_checkpoint, 1)
    assert_same_weights(newest.checkpoint, weights)


def test_a_bit_that_flips_during_a_download_is_an_error(proxy, run, weights):
    checkpoint = save(run, 1, weights)
    proxy.disturb(Fault("flip", "GET", "/weights/"))
    with pytest.raises(CheckpointError, match="does not have the hash it was written with"):
        load_model(checkpoint)
    assert_same_weights(checkpoint, weights)
