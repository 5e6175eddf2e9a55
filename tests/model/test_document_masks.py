"""Tests of document masks, with which a document in a packed sample has the same results as alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mhmoe_ray.model import decoder
from mhmoe_ray.model.attention import Attention, Documents, document_mask, document_offsets, has_variable_length_kernel
from mhmoe_ray.model.rotary import RotaryTables
from mhmoe_ray.serving.engine.paged_cache import PagedCache, PagedStep
from tests.support.decoders import KINDS, build_decoder, random_tokens
from tests.support.paged import logits_in_parts
from tests.support.tensors import default_dtype

LENGTHS = [[7, 1, 12], [13, 7], [20]]
"""Lengths of the documents in each sample of a batch."""


def documents() -> torch.Tensor:
    """Return the document id of each token of the batch that `LENGTHS` describes."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_packed_document_has_the_same_logits_as_alone(heads, kind):
    model, x = build_decoder(heads, document_masks=True, **kind), random_tokens(3, 20)
    plain = build_decoder(heads, **kind)
    packed, unmasked = model(x, document_BT=documents()).logits_BTV, plain(x).logits_BTV
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            expected = plain(x[row : row + 1, part]).logits_BTV[0]
            # A document has other positions in a packed sample than alone. The sines and cosines of positions are
            # float32, so the logits differ by rounding errors.
            torch.testing.assert_close(packed[row, part], expected, atol=1e-5, rtol=1e-5)
            is_affected = (unmasked[row, part] - expected).abs().amax() > 1e-3
            assert is_affected == (start > 0), "without masks earlier documents must show, or the test could not fail"
            start += length


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_a_token_attends_to_itself_and_earlier_tokens_of_its_document(ids):
    mask = document_mask(torch.tensor(ids), torch.float32)
    assert mask.shape == (len(ids), 1, 6, 6)
    for b, row in enumerate(ids):
        for query in range(6):
            for key in range(6):
                is_visible = key <= query and row[key] == row[query]
                assert mask[b, 0, query, key].item() == (0 if is_visible else float("-inf"))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation_treats_the_tokens_as_one_document(kind):
    model, x = build_decoder(document_masks=True, **kind), random_tokens(2, 17)
    expected = model(x, document_BT=torch.zeros_like(x)).logits_BTV
    torch.testing.assert_close(logits_in_parts(model, x, [5, 1, 11]), expected, atol=1e-6, rtol=1e-6)


def test_document_ids_are_required_exactly_for_masks_without_a_cache():
    x = random_tokens(1, 4)
    masked = build_decoder(document_masks=True)
    with pytest.raises(AssertionError):
        masked(x)
    with pytest.raises(AssertionError):
        masked(x, PagedStep(PagedCache(masked.spec, 1, x.dtype, x.device), []), document_BT=torch.zeros_like(x))
    with pytest.raises(AssertionError):
        build_decoder()(x, document_BT=torch.zeros_like(x))


def attend_by_document(q, k, v, offset_q, offset_k, max_q, max_k, window_size):
    """Compute what torch's variable-length kernel computes, which needs a GPU: causal attention from one offset to
    the next."""
    assert torch.equal(offset_q, offset_k)
    assert offset_q.dtype == torch.int32
    assert window_size == (-1, 0)
    lengths = offset_q.diff()
    assert lengths.max() <= max_q == max_k
    parts = zip(*(t.split(lengths.tolist()) for t in (q, k, v)), strict=True)
    outputs = [F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in part), is_causal=True) for part in parts]
    return torch.cat([y.transpose(0, 1) for y in outputs])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_offsets_restrict_attention_as_the_mask_does(monkeypatch, kind):
    """The arguments of torch's kernel are checked with a stand-in for it, because the kernel needs a GPU."""
    model, x = build_decoder(2, document_masks=True, **kind), random_tokens(3, 20)
    starts_BT = documents().diff(dim=1, prepend=torch.full((3, 1), -1)) > 0
    offset_N1 = document_offsets(starts_BT)
    assert offset_N1.tolist() == [0, 7, 8, 20, 33, 40, 60]
    expected = model(x, document_BT=documents()).logits_BTV
    assert torch.equal(model(x, document_BT=documents(), document_offset_N1=offset_N1).logits_BTV, expected)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_by_document)
    monkeypatch.setattr(decoder, "has_variable_length_kernel", lambda spec, x: True)
    actual = model(x, document_BT=documents(), document_offset_N1=offset_N1).logits_BTV
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_sequence_begins_a_document_also_without_a_start_token():
    starts_BT = torch.tensor([[False, True, False], [False, False, False]])
    assert document_offsets(starts_BT).tolist() == [0, 1, 3, 6]
    assert not starts_BT[0, 0]


@pytest.mark.parametrize("with_offsets", [False, True])
def test_attention_within_documents_runs_on_fake_cuda_tensors(monkeypatch, with_offsets):
    """Attention with grouped queries, and with a mask or offsets, reads no tensor's values on the host."""
    # A CPU build of torch cannot fill fake tensors of this device with random numbers, or move them there.
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)
    # torch 2.15 chooses between two kernels by the GPU.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    spec = build_decoder(1, kv_heads=2, document_masks=True).spec
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"), default_dtype(torch.bfloat16):
            attention = Attention(spec)

        def empty(*shape, dtype):
            return torch.empty(*shape, dtype=dtype, device="cuda")

        x_BTM = empty(2, 16, spec.d_model, dtype=torch.bfloat16)
        assert has_variable_length_kernel(spec, x_BTM)
        assert not has_variable_length_kernel(spec, x_BTM.float())
        tables = RotaryTables(*(empty(16, spec.head_width, dtype=torch.float32) for _ in range(4)))
        mask_B1TT = empty(2, 1, 16, 16, dtype=torch.bfloat16)
        offset_N1 = empty(6, dtype=torch.int32)
        restriction = Documents(None, offset_N1) if with_offsets else Documents(mask_B1TT, None)
        y_BTM = attention(x_BTM, tables, documents=restriction)
    assert (y_BTM.device.type, y_BTM.shape) == ("cuda", x_BTM.shape)
