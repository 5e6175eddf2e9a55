"""Measurement of a model's losses and routes on samples of its sequence length, domain by domain."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mhmoe_ray.data.chat.encoder import ConversationEncoder
from mhmoe_ray.data.chat.template import ChatTemplate
from mhmoe_ray.data.prepare.packing import pack_best_fit
from mhmoe_ray.data.samples import validation_samples
from mhmoe_ray.data.shards.columns import Samples, padding_token, to_model_samples
from mhmoe_ray.data.shards.manifest import require_data_manifest
from mhmoe_ray.data.sources import Document, FileReader, find_files
from mhmoe_ray.data.tokenizer import UNKNOWN_WIDTH, DocumentEncoder
from mhmoe_ray.errors import DataError
from mhmoe_ray.evaluate.request import RoutingCounts
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.model.attention import document_indices
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.loss import token_losses
from mhmoe_ray.model.router import Routing
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.spec.formats import CHAT_FORMATS
from mhmoe_ray.storage import Location


class DomainSamples(NamedTuple):
    """Samples of one domain of text, each of T + 1 tokens, where T is the model's sequence length."""

    domain: str
    tokens: Samples
    """Token ids, (samples, T + 1)."""
    target_mask: np.ndarray
    """Mask of the targets that count, (samples, T) bool."""
    document_starts: np.ndarray | None = None
    """Mask of the input tokens that begin a document, (samples, T) bool; None if a start token begins each."""


def held_out_samples(folder: Location) -> Iterator[DomainSamples]:
    """Yield the held-out samples of a prepared folder by domain; training validates on the same samples."""
    manifest = require_data_manifest(folder)
    samples = validation_samples(folder, manifest)
    # Validation samples are stored domain after domain in the manifest's order, so each domain is a range of samples.
    start = 0
    for name, domain in manifest.domains.items():
        end = start + domain.validation_samples
        if end > start:
            starts = samples.document_starts
            yield DomainSamples(
                name,
                samples.token_ids[start:end],
                samples.target_mask[start:end],
                None if starts is None else starts[start:end],
            )
        start = end


def text_samples(data: DataSpec, encoder: DocumentEncoder, seq_len: int, max_samples: int) -> Iterator[DomainSamples]:
    """Read raw text; yield the samples of each domain, whose documents are tokenized, concatenated and cut.

    Each domain's first `max_samples` samples count, without conversations. Missing or unreadable text is a DataError.
    """
    ids_by_domain: dict[str, list[int]] = {}
    # Neighbouring samples overlap by one token, so n samples of T targets take n * T + 1 tokens.
    max_tokens = max_samples * seq_len + 1
    for file in find_files(data):
        if file.format in CHAT_FORMATS:
            continue
        domain_ids = ids_by_domain.setdefault(file.domain, [])
        if len(domain_ids) >= max_tokens:
            # Opening a file can mean a download, so no more files are opened for a domain that has enough tokens.
            continue
        for item in FileReader(file, data):
            if isinstance(item, Document):
                domain_ids += encoder.encode([item.text])[0]
            if len(domain_ids) >= max_tokens:
                break
    for domain, ids in ids_by_domain.items():
        if len(ids) < 2:
            raise DataError(f"text {domain}", "no text in it can be read", "see `mhmoe data inspect`")
        yield _cut_samples(domain, ids[:max_tokens], seq_len)


def _cut_samples(domain: str, ids: list[int], seq_len: int) -> DomainSamples:
    """Cut the tokens of one domain into samples; pad the last sample with token 0, and mask its padding.

    Neighbouring samples share a token: the last target of one is the first input of the next.
    """
    sample_count = -(-(len(ids) - 1) // seq_len)
    tokens = np.zeros((sample_count, seq_len + 1), np.int64)
    target_mask = np.zeros((sample_count, seq_len), bool)
    for i in range(sample_count):
        sample_ids = ids[i * seq_len : (i + 1) * seq_len + 1]
        tokens[i, : len(sample_ids)] = sample_ids
        target_mask[i, : len(sample_ids) - 1] = True
    return DomainSamples(domain, tokens, target_mask)


def conversation_samples(
    data: DataSpec,
    encoder: ConversationEncoder,
    template: ChatTemplate,
    seq_len: int,
    max_samples: int,
    *,
    is_packed: bool,
) -> Iterator[DomainSamples]:
    """Read conversations; yield the samples of each domain, in which only the assistant's turns are targets.

    Conversations longer than `seq_len` input tokens are cut, and each domain's first `max_samples` samples with targets
    count. If `is_packed`, samples have several conversations, which the model must keep apart by document masks.
    Missing or unreadable conversations are a DataError.
    """
    padding, rows_by_domain, token_counts = padding_token(_TOKEN_BYTES), dict[str, list[np.ndarray]](), Counter[str]()
    for file in find_files(data):
        if file.format not in CHAT_FORMATS:
            continue
        domain_rows = rows_by_domain.setdefault(file.domain, [])
        for item in FileReader(file, data, template):
            # Reading stops when there are enough tokens for all samples or, if each conversation gets samples of its
            # own, when there are as many conversations as samples.
            if token_counts[file.domain] > max_samples * seq_len or (not is_packed and len(domain_rows) == max_samples):
                break
            if isinstance(item, Document):
                assert item.conversation is not None
                [encoded_conversation] = encoder.encode([item.conversation])
                domain_rows.append(encoded_conversation.rows(_TOKEN_BYTES))
                token_counts[file.domain] += len(encoded_conversation.token_ids)
    for domain, rows in rows_by_domain.items():
        if not rows:
            raise DataError(f"text {domain}", "no conversation in it can be read", "see `mhmoe data lint`")
        groups = [np.concatenate(rows)] if is_packed else rows
        packed_samples = [pack_best_fit(group, seq_len, encoder.start_token, padding).samples for group in groups]
        samples = to_model_samples(np.concatenate(packed_samples), _TOKEN_BYTES)
        # The first samples of a conversation with a long prompt have no word of the assistant. They have no targets and
        # therefore no loss, so they are left out.
        sample_indices = np.flatnonzero(samples.target_mask.any(1))[:max_samples]
        starts = samples.document_starts
        yield DomainSamples(
            domain,
            samples.token_ids[sample_indices],
            samples.target_mask[sample_indices],
            None if starts is None else starts[sample_indices],
        )


# Bytes per token. The samples are not written to disk, so their size matters little, and four bytes hold any token id.
_TOKEN_BYTES = 4


class RouteCounter:
    """Counter of the routes in the forward passes of a mixture-of-experts model, by domain of the text."""

    def __init__(self, model: Trunk) -> None:
        moe = model.spec.moe
        assert moe is not None
        self._moe, self._layers = moe, model.moe_layers()
        self._counts_by_domain: dict[str, _DomainCounts] = {}
        self._mask_N: Tensor | None = None
        self._top_k = moe.top_k
        self._current_counts: _DomainCounts | None = None

    @contextmanager
    def counting_routes(self, domain: str, mask_BT: Tensor, top_k: int | None = None) -> Iterator[None]:
        """Count the routes of the forward pass within the context, for the tokens in `mask_BT`."""
        self._top_k = top_k or self._moe.top_k
        shape = len(self._layers), self._moe.experts, self._moe.heads, self._top_k
        self._current_counts = self._counts_by_domain.setdefault(domain, _DomainCounts.empty(*shape))
        self._mask_N = mask_BT.flatten()
        self._current_counts.tokens += int(self._mask_N.sum())
        handles = [
            layer.router.register_forward_hook(self._layer_hook(layer_index))
            for layer_index, layer in enumerate(self._layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layer_hook(self, layer_index: int) -> Any:
        def count_routes(_: nn.Module, __: Any, routing: Routing) -> None:
            assert self._current_counts is not None
            assert self._mask_N is not None
            heads = self._moe.heads
            # If the tasks of a model choose different numbers of experts, the router's output has columns for the
            # largest number. The first `top_k` columns have the choices of these tokens.
            expert_NHK = routing.expert_NK.view(-1, heads, routing.expert_NK.shape[1])[self._mask_N, :, : self._top_k]
            gate_NHK = routing.gate_NK.view_as(routing.expert_NK).view(-1, heads, routing.expert_NK.shape[1])
            gate_NHK = gate_NHK[self._mask_N, :, : self._top_k]
            self._current_counts.add_routes(layer_index, expert_NHK, gate_NHK)

        return count_routes

    def routing_counts(self) -> dict[str, RoutingCounts]:
        """Return the counts of the forward passes so far within `counting_routes`, by domain."""
        return {domain: counts.to_routing_counts() for domain, counts in self._counts_by_domain.items()}


class _DomainCounts:
    """Counts of the routes of one domain, as tensors on the CPU with the fields of `RoutingCounts`."""

    def __init__(self, counts_LE: Tensor, distinct_LR: Tensor, agreement_LHH: Tensor) -> None:
        self.tokens = 0
        self.counts_LE, self.tokens_LE = counts_LE, counts_LE.clone()
        self.distinct_LR, self.agreement_LHH = distinct_LR, agreement_LHH
        self.first_weight_L = torch.zeros(len(counts_LE), dtype=torch.float64)

    @classmethod
    def empty(cls, layers: int, experts: int, heads: int, top_k: int) -> "_DomainCounts":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(layers, *shape, dtype=torch.int64)

        return cls(zeros(experts), zeros(heads * top_k + 1), zeros(heads, heads))

    def add_routes(self, layer_index: int, expert_NHK: Tensor, gate_NHK: Tensor) -> None:
        """Add the routes of N tokens in one layer."""
        experts = self.counts_LE.shape[1]
        self.counts_LE[layer_index] += expert_NHK.flatten().bincount(minlength=experts).cpu()
        sorted_expert_NR = expert_NHK.flatten(1).sort(1).values
        # An expert counts once per token. Sorting puts equal experts of a token side by side, so that the first of them
        # can be marked.
        is_first_NR = torch.ones_like(sorted_expert_NR, dtype=torch.bool)
        is_first_NR[:, 1:] = sorted_expert_NR[:, 1:] != sorted_expert_NR[:, :-1]
        self.tokens_LE[layer_index] += sorted_expert_NR[is_first_NR].bincount(minlength=experts).cpu()
        self.distinct_LR[layer_index] += is_first_NR.sum(1).bincount(minlength=self.distinct_LR.shape[1]).cpu()
        first_choice_NH = expert_NHK[:, :, 0]
        self.agreement_LHH[layer_index] += (first_choice_NH[:, :, None] == first_choice_NH[:, None, :]).sum(0).cpu()
        # The sum is float64, because a float32 sum over many tokens would lose digits.
        self.first_weight_L[layer_index] += gate_NHK[:, :, 0].sum(dtype=torch.float64).cpu()

    def to_routing_counts(self) -> RoutingCounts:
        return RoutingCounts(
            tokens=self.tokens,
            counts=self.counts_LE.tolist(),
            tokens_of=self.tokens_LE.tolist(),
            distinct=self.distinct_LR.tolist(),
            agreement=self.agreement_LHH.tolist(),
            first_weight=self.first_weight_L.tolist(),
        )


class SampleBatch(NamedTuple):
    """Batch of samples of one domain."""

    ids: np.ndarray
    mask: np.ndarray
    """Mask of the targets that count, (B, T) bool."""
    token_BT: Tensor
    """Token ids on the model's device, (B, T + 1), equal to `ids`."""
    mask_BT: Tensor
    document_BT: Tensor | None
    """Index of each input token's document; None without document masks."""

    def score(self, widths: np.ndarray, nats: float) -> Score:
        """Return the batch's score, from the bytes of each token of the vocabulary and the sum of losses in nats."""
        # P is the number of predicted tokens that count.
        width_P = widths[self.ids[:, 1:]][self.mask]
        return Score(
            nats=nats,
            tokens=int(self.mask.sum()),
            text_bytes=int(width_P[width_P != UNKNOWN_WIDTH].sum()),
            unknown=int((width_P == UNKNOWN_WIDTH).sum()),
        )


class MeasureSettings(NamedTuple):
    """Settings of a measurement of a model."""

    batch_size: int
    start_token: int
    """Token that begins a document, for models with `document_masks`."""
    use_bfloat16: bool
    on_progress: Callable[[str, int, int], None]


def sample_batches(model: Decoder, samples: DomainSamples, settings: MeasureSettings) -> Iterator[SampleBatch]:
    """Yield the samples of a domain in batches on the model's device."""
    device = model.embedding.weight.device
    _, tokens, target_mask, document_starts = samples
    for start in range(0, len(tokens), settings.batch_size):
        rows = slice(start, start + settings.batch_size)
        ids, mask, document_BT = tokens[rows], target_mask[rows], None
        if model.spec.document_masks:
            # Samples without a mask of document starts have a start token at the beginning of each document.
            starts = ids[:, :-1] == settings.start_token if document_starts is None else document_starts[rows]
            document_BT = document_indices(torch.from_numpy(starts).to(device))
        token_BT, mask_BT = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        yield SampleBatch(ids, mask, token_BT, mask_BT, document_BT)


def sample_losses(model: Decoder, batch: SampleBatch, expert: int | None, settings: MeasureSettings) -> Tensor:
    """Return the loss of each sample in nats, summed over the targets that count, float64, (B,).

    `expert` computes all samples with router `domain`; it is None for any other router.
    """
    token_BT = batch.token_BT
    domain_B = None if expert is None else token_BT.new_full((len(token_BT),), expert)
    with torch.autocast(token_BT.device.type, torch.bfloat16, enabled=settings.use_bfloat16):
        logits_BTV = model(token_BT[:, :-1], document_BT=batch.document_BT, domain_B=domain_B).logits_BTV
    return (token_losses(logits_BTV, token_BT[:, 1:]) * batch.mask_BT).sum(1, dtype=torch.float64)


@torch.inference_mode()
def measure_samples(
    model: Decoder,
    samples: Iterable[DomainSamples],
    widths: np.ndarray,
    settings: MeasureSettings,
) -> tuple[dict[str, Score], dict[str, RoutingCounts]]:
    """Run a model in evaluation mode over samples and return its scores and its counts of routes, both by domain.

    A dense model has no counts. With router `domain`, the expert of each domain computes its samples; a missing expert
    is a DataError. `widths` are the bytes of each of the model's tokens (`data.tokenizer.token_widths`).
    """
    route_counter = RouteCounter(model) if model.spec.moe else None
    scores: dict[str, Score] = {}
    for domain_samples in samples:
        domain, sample_count = domain_samples.domain, len(domain_samples.tokens)
        expert, finished_count = _expert_of(model, domain), 0
        score = scores.setdefault(domain, Score())
        for batch in sample_batches(model, domain_samples, settings):
            counting_context = route_counter.counting_routes(domain, batch.mask_BT) if route_counter else nullcontext()
            with counting_context:
                loss_B = sample_losses(model, batch, expert, settings)
            score += batch.score(widths, float(loss_B.sum()))
            finished_count += len(loss_B)
            settings.on_progress(domain, finished_count, sample_count)
        scores[domain] = score
    return scores, route_counter.routing_counts() if route_counter else {}


def _expert_of(model: Decoder, domain: str) -> int | None:
    """Return the expert of a domain with router `domain`, else None; a missing expert is a DataError."""
    moe = model.spec.moe
    if moe is None or moe.router != "domain":
        return None
    expert = moe.expert_of_domain(domain)
    if expert is None:
        fix = "give a prior (uniform, updating or cached), with which no domain is needed"
        raise DataError(f"domain {domain}", "the model has no expert for it", fix)
    return expert
