"""Tests of document masks, with which a document in a packed sample has the same results as alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.model.attention import document_mask
from mhmoe_ray.serving.engine.paged_cache import PagedCache, PagedStep
from tests.model.test_decoder import KINDS, build_decoder, random_tokens
from tests.paged import logits_in_parts

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
