"""The end of a preparation: validation samples, baselines of their loss, and manifest entries."""

from collections.abc import Mapping
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from mhmoe_ray.data.family import data_of
from mhmoe_ray.data.prepare.baselines import compute_baselines, join_pairs, token_pairs
from mhmoe_ray.data.prepare.packing import PackingSettings, ShardResult
from mhmoe_ray.data.prepare.parts import TokenisedPart
from mhmoe_ray.data.prepare.rows import write_validation_rows
from mhmoe_ray.data.prepare.validation import ValidationSplit, write_validation_split
from mhmoe_ray.data.shards.columns import padding_token
from mhmoe_ray.data.shards.manifest import Baselines, Domain, Shard
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.data.sources import Tally
from mhmoe_ray.spec import RunSpec

BASELINE_TOKENS = 20_000_000
"""Approximate number of training tokens on which the bigram model is counted."""


def domain_entry(
    parts: list[TokenisedPart],
    tally: Tally,
    shard_results: list[ShardResult],
    validation_samples: int,
    seq_len: int,
    *,
    has_chat: bool,
    has_rows: bool,
) -> Domain:
    """Return the manifest's entry of a domain from its parts, the tally of its files and its shards.

    With `has_chat` (a source has conversations) it has the number of targets, with `has_rows` that of images.
    """
    counts = [part.counts for part in parts]
    documents, tokens = sum(c.documents for c in counts), sum(c.tokens for c in counts)
    samples, padding = (
        sum(result.shard.rows for result in shard_results),
        sum(result.padding for result in shard_results),
    )
    # If packing concatenates documents, each token of the domain but the first can be a target, so `tokens - 1 -
    # targets` tokens are unused. With best fit, the end of each document is a target too, so there are as many targets
    # as tokens, and no token is unused.
    targets = samples * seq_len - padding
    rows = [c.rows for c in counts if c.rows is not None]
    return Domain(
        documents=documents,
        validation_documents=sum(c.held_out_documents for c in counts),
        quarantined=dict(tally.bad),
        dropped=dict(tally.dropped),
        text_bytes=sum(c.text_bytes for c in counts),
        tokens=tokens,
        validation_tokens=sum(c.held_out_tokens for c in counts),
        samples=samples,
        validation_samples=validation_samples,
        unused_tokens=sum(c.cut_tokens for c in rows) if has_rows else max(0, tokens - 1 - targets),
        padding=padding,
        target_tokens=sum(result.targets for result in shard_results) if has_chat else None,
        cut_documents=documents - sum(result.whole_documents for result in shard_results),
        images=sum(c.images for c in rows) if has_rows else None,
        image_bytes=sum(c.image_bytes for c in rows) if has_rows else None,
        shards=[result.shard for result in shard_results],
    )


class FinishResult(NamedTuple):
    """Results of the last stage of a preparation."""

    validation: ValidationSplit
    baselines: Baselines | None
    """None if no source has texts, or samples are pairs, whose loss has another unit."""


def finish(
    settings: PackingSettings,
    held_out: Mapping[str, Any],
    shards: dict[str, list[Shard]],
    spec: RunSpec,
) -> FinishResult | None:
    """Write the validation samples, and compute the baselines of their loss.

    `held_out` has the tokens (`TokenStream`) of each domain, or its rows (`PartSlice`s) if the family has rows. The
    result is None if sources of rows have texts, but no selected sample has one. The bigram model is counted on each
    domain's first samples, about `BASELINE_TOKENS` tokens in all.
    """
    write = write_validation_rows if data_of(spec.model).has_rows else write_validation_split
    split = write(settings, held_out, spec.data.validation_samples)
    if not spec.data.has_texts or spec.data.pair_sources:
        return FinishResult(split, None)
    if not split.target_count and data_of(spec.model).has_rows:
        return None
    folder, token_bytes = settings.folder, settings.token_bytes
    padding = padding_token(token_bytes)
    readers = [ShardReader(folder, shards[name], token_bytes) for name in sorted(shards) if shards[name]]
    share = min(1.0, BASELINE_TOKENS / (sum(map(len, readers)) * spec.data.seq_len))
    train_pairs = (token_pairs(reader.read(np.arange(ceil(share * len(reader)))), padding) for reader in readers)
    validation = ShardReader(folder, split.shards, token_bytes)
    validation_pairs = token_pairs(validation.read(np.arange(len(validation))), padding)
    return FinishResult(split, compute_baselines(join_pairs(train_pairs), validation_pairs, spec.model.vocab_size))
