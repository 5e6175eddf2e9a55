"""Tokens of domains to shards: what each shard is made of, and the task that makes it."""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

from mhmoe_ray.data.prepare import best_fit, concat
from mhmoe_ray.data.prepare.parts import Stream
from mhmoe_ray.data.shards.files import SHARD_BYTES, padding_token, rows_per_shard, write_shard
from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.spec import DataSpec


class ShardPlan(NamedTuple):
    """One shard to be made."""

    domain: str
    number: int
    tokens: Stream
    samples: int | None
    """That concatenation cuts; best fit finds out."""


class Made(NamedTuple):
    domain: str
    number: int
    shard: Shard
    padding: int
    whole_documents: int


def plan_shards(domain: str, stream: Stream, spec: DataSpec, token_bytes: int) -> list[ShardPlan]:
    """The shards of a domain; what they hold depends on its tokens alone, so they can be made in any order."""
    if spec.packing == "best_fit":
        streams = best_fit.plan_best_fit(stream, SHARD_BYTES // token_bytes)
        return [ShardPlan(domain, i, part, None) for i, part in enumerate(streams)]
    cuts = concat.plan_concat(stream, spec.seq_len, rows_per_shard(spec.seq_len, token_bytes))
    return [ShardPlan(domain, i, cut.stream, cut.samples) for i, cut in enumerate(cuts)]


def make_shard(row: dict[str, Any], *, folder: Path, seq_len: int, token_bytes: int, start: int) -> dict[str, Any]:
    """A task of Ray Data: a pickled `Plan` to a pickled `Made`.

    Args:
        row: its `plan`.
        folder: of the prepared data to be.
        seq_len: T.
        token_bytes: 2 or 4.
        start: the token that each document begins with.
    """
    asked: ShardPlan = pickle.loads(row["plan"])
    tokens = asked.tokens.read()
    if asked.samples is None:
        samples, padding, cut = best_fit.pack_best_fit(tokens, seq_len, start, padding_token(token_bytes))
        whole = int((tokens == start).sum()) - cut
    else:
        samples, padding = concat.cut_concat(tokens, asked.samples, seq_len), 0
        whole = concat.whole_documents(tokens, asked.samples, seq_len, start)
    shard = write_shard(folder, f"train/{asked.domain}/{asked.number:05d}.arrow", samples)
    return {"made": pickle.dumps(Made(asked.domain, asked.number, shard, padding, whole))}
