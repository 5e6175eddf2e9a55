"""Losses and routes of a model over samples."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from mhmoe_ray.data.tokenizer import UNKNOWN
from mhmoe_ray.evaluate.counts import RoutingCounts
from mhmoe_ray.evaluate.routing import Collector
from mhmoe_ray.evaluate.samples import DomainSamples
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.model.attention import document_of
from mhmoe_ray.model.decoder import Decoder, token_losses


@torch.inference_mode()
def measure(
    model: Decoder,
    samples: Iterable[DomainSamples],
    widths: np.ndarray,
    *,
    batch: int,
    start_token: int,
    half: bool,
    on_progress: Callable[[str, int, int], None],
) -> tuple[dict[str, Score], dict[str, RoutingCounts]]:
    """By domain: what its tokens cost, and where they went; no routes for a dense model.

    Args:
        model: in evaluation mode; routing is dropless, as in serving.
        samples: to go over.
        widths: bytes of each of the model's tokens (`data.tokenizer.token_widths`).
        batch: samples at a time.
        start_token: that begins a document, where the model has `document_masks`.
        half: matrix products in bfloat16, as a training with that precision validates.
        on_progress: is told the domain, samples done, and samples in all of it.
    """
    device = model.embedding.weight.device
    collector = Collector(model) if model.spec.moe else None
    scores: dict[str, Score] = {}
    for domain, tokens, counts in samples:
        score = scores.setdefault(domain, Score())
        for first in range(0, len(tokens), batch):
            ids, real = tokens[first : first + batch], counts[first : first + batch]
            token_BT, real_BT = torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device)
            counting = collector.counting(domain, real_BT) if collector else nullcontext()
            with counting, torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits_BTV = model(token_BT[:, :-1], document_BT=_documents(model, token_BT, start_token)).logits_BTV
            width_P = widths[ids[:, 1:]][real]
            loss_BT = token_losses(logits_BTV, token_BT[:, 1:]) * real_BT
            score += Score(
                nats=float(loss_BT.sum(dtype=torch.float64)),
                tokens=int(real.sum()),
                text_bytes=int(width_P[width_P != UNKNOWN].sum()),
                unknown=int((width_P == UNKNOWN).sum()),
            )
            on_progress(domain, min(first + batch, len(tokens)), len(tokens))
        scores[domain] = score
    return scores, collector.result() if collector else {}


def _documents(model: Decoder, token_BT: Tensor, start_token: int) -> Tensor | None:
    """Which document each input token belongs to."""
    return document_of(token_BT[:, :-1], start_token) if model.spec.document_masks else None
