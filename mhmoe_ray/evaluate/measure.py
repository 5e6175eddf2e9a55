"""Losses and routes of a model over samples of its sequence length, domain by domain."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mhmoe_ray.data.shards.files import Samples
from mhmoe_ray.data.shards.manifest import require_data_manifest
from mhmoe_ray.data.sources import Document, Reading, find_files
from mhmoe_ray.data.stream import validation_samples
from mhmoe_ray.data.tokenizer import UNKNOWN, DocumentEncoder
from mhmoe_ray.errors import DataError
from mhmoe_ray.evaluate.request import RoutingCounts
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.model.attention import document_of
from mhmoe_ray.model.decoder import Decoder, token_losses
from mhmoe_ray.model.router import Routing
from mhmoe_ray.spec import DataSpec


class DomainSamples(NamedTuple):
    domain: str
    tokens: Samples
    """Token ids, (samples, T + 1)."""
    counts: np.ndarray
    """Mask of the targets that count, (samples, T) bool."""


def held_out(folder: Path) -> Iterator[DomainSamples]:
    """Yield, by domain, the held-out samples on which training validates.

    Raises:
        DataError: the folder is not prepared.
    """
    manifest = require_data_manifest(folder)
    tokens, counts = validation_samples(folder, manifest)
    start = 0
    for name, domain in manifest.domains.items():
        end = start + domain.validation_samples
        if end > start:
            yield DomainSamples(name, tokens[start:end], counts[start:end])
        start = end


def of_text(data: DataSpec, encoder: DocumentEncoder, seq_len: int, most: int) -> Iterator[DomainSamples]:
    """Yield, by domain, raw text as samples: documents are concatenated and cut wherever a sample is full.

    Args:
        data: names the text.
        encoder: encoder of the run's tokenizer.
        seq_len: T, the number of input tokens per sample.
        most: largest number of samples per domain, taken from its beginning.

    Raises:
        DataError: there is no text, or none of a domain's text can be read.
    """
    by_domain: dict[str, list[int]] = {}
    wanted = most * seq_len + 1
    for file in find_files(data):
        found = by_domain.setdefault(file.domain, [])
        if len(found) >= wanted:
            continue  # before another file is opened
        for item in Reading(file, data):
            if isinstance(item, Document):
                found += encoder.encode([item.text])[0]
            if len(found) >= wanted:
                break
    for domain, ids in by_domain.items():
        if len(ids) < 2:
            raise DataError(f"text {domain}", "nothing of it can be read", "see `mhmoe data inspect`")
        yield _cut(domain, ids[:wanted], seq_len)


def _cut(domain: str, ids: list[int], seq_len: int) -> DomainSamples:
    """Cut one domain's tokens into samples, the last one padded with token 0 and masked.

    Neighbouring samples share a token: the last target of one is the first input of the next.
    """
    samples = -(-(len(ids) - 1) // seq_len)
    tokens = np.zeros((samples, seq_len + 1), np.int64)
    counts = np.zeros((samples, seq_len), bool)
    for i in range(samples):
        part = ids[i * seq_len : (i + 1) * seq_len + 1]
        tokens[i, : len(part)] = part
        counts[i, : len(part) - 1] = True
    return DomainSamples(domain, tokens, counts)


class Collector:
    """Count the routes of a decoder's forward passes, by domain."""

    def __init__(self, model: Decoder) -> None:
        """Count nothing yet.

        Args:
            model: a model with experts.
        """
        moe = model.spec.moe
        assert moe is not None
        self._moe, self._layers = moe, model.moe_layers()
        self._kept: dict[str, _Counts] = {}
        self._real_N: Tensor | None = None
        self._current: _Counts | None = None

    @contextmanager
    def counting(self, domain: str, real_BT: Tensor) -> Iterator[None]:
        """Count the routes of the forward pass that runs within the context.

        Args:
            domain: the domain that its tokens belong to.
            real_BT: mask of the tokens that count.
        """
        shape = len(self._layers), self._moe.experts, self._moe.heads, self._moe.top_k
        self._current = self._kept.setdefault(domain, _Counts.empty(*shape))
        self._real_N = real_BT.flatten()
        self._current.tokens += int(self._real_N.sum())
        handles = [layer.router.register_forward_hook(self._hook(number)) for number, layer in enumerate(self._layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int) -> Any:
        def count(_: nn.Module, __: Any, routing: Routing) -> None:
            assert self._current is not None
            assert self._real_N is not None
            h = self._moe.heads
            expert_NHK = routing.expert_NK.view(-1, h, self._moe.top_k)[self._real_N]
            gate_NHK = routing.gate_NK.view_as(routing.expert_NK).view(-1, h, self._moe.top_k)[self._real_N]
            self._current.add(layer, expert_NHK, gate_NHK)

        return count

    def result(self) -> dict[str, RoutingCounts]:
        return {domain: counts.plain() for domain, counts in self._kept.items()}


class _Counts:
    def __init__(self, counts_LE: Tensor, distinct_LR: Tensor, agreement_LHH: Tensor) -> None:
        self.tokens = 0
        self.counts_LE, self.tokens_LE = counts_LE, counts_LE.clone()
        self.distinct_LR, self.agreement_LHH = distinct_LR, agreement_LHH
        self.first_weight_L = torch.zeros(len(counts_LE), dtype=torch.float64)

    @classmethod
    def empty(cls, layers: int, experts: int, heads: int, top_k: int) -> "_Counts":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(layers, *shape, dtype=torch.int64)

        return cls(zeros(experts), zeros(heads * top_k + 1), zeros(heads, heads))

    def add(self, layer: int, expert_NHK: Tensor, gate_NHK: Tensor) -> None:
        experts = self.counts_LE.shape[1]
        self.counts_LE[layer] += expert_NHK.flatten().bincount(minlength=experts).cpu()
        of_token_NR = expert_NHK.flatten(1).sort(1).values
        is_new_NR = torch.ones_like(of_token_NR, dtype=torch.bool)
        is_new_NR[:, 1:] = of_token_NR[:, 1:] != of_token_NR[:, :-1]
        self.tokens_LE[layer] += of_token_NR[is_new_NR].bincount(minlength=experts).cpu()
        self.distinct_LR[layer] += is_new_NR.sum(1).bincount(minlength=self.distinct_LR.shape[1]).cpu()
        first_NH = expert_NHK[:, :, 0]
        self.agreement_LHH[layer] += (first_NH[:, :, None] == first_NH[:, None, :]).sum(0).cpu()
        self.first_weight_L[layer] += gate_NHK[:, :, 0].sum(dtype=torch.float64).cpu()

    def plain(self) -> RoutingCounts:
        return RoutingCounts(
            tokens=self.tokens,
            counts=self.counts_LE.tolist(),
            tokens_of=self.tokens_LE.tolist(),
            distinct=self.distinct_LR.tolist(),
            agreement=self.agreement_LHH.tolist(),
            first_weight=self.first_weight_L.tolist(),
        )


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
    """Run the model over the samples and return, by domain, the scores and the counts of routes.

    A dense model has no counts of routes: its second dictionary is empty.

    Args:
        model: the model, in evaluation mode; routing is dropless, as in serving.
        samples: the samples to evaluate.
        widths: bytes of each of the model's tokens (`data.tokenizer.token_widths`).
        batch: number of samples per forward pass.
        start_token: token that begins a document; it is used if the model has `document_masks`.
        half: compute matrix products in bfloat16, as training with that precision does when it validates.
        on_progress: called with the domain, its samples done so far, and its samples in all.
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
    """Return the number of the document that each input token belongs to; None for a model without document masks."""
    return document_of(token_BT[:, :-1], start_token) if model.spec.document_masks else None
