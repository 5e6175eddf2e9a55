"""Mixture weights: how much a training reads of each domain, phase by phase, from the spec and the prepared counts.

    by size      W_s p_i: the source's weight, divided over its subfolders by their tokens, or by fixed shares
    tempered     W_s q_i, q_i = p_i^alpha / sum_j p_j^alpha (XLM's rule); fixed shares stay
    weights      the same after `max_epochs`, as the whole numbers that the order deals by

Limits: a domain may be read limit = floor(max_epochs * samples) times in the whole training. The limit is divided over
the phases in proportion to what they would read without limits. Within a phase, the samples that a domain cannot
provide go to the other domains of its source in proportion; a source whose domains are all at their limits leaves the
rest to the other sources.

Without `max_epochs` anywhere, a phase deals by shares out of 2^50, so that its order does not depend on its length: a
longer training begins with the same order as a shorter one. With `max_epochs`, a phase deals exactly as many samples as
it has positions, so that limits are exact to the sample, and the order depends on `train.steps`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import cached_property
from itertools import accumulate, pairwise
from math import fsum

from mhmoe_ray.data.domains import source_of, subfolder_of
from mhmoe_ray.data.order.order import MAX_WEIGHT, Order, OrderedDomain, Phase, seeded
from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import RunSpec, SourceMix


def apportion(total: int, weights: Sequence[float], limits: Sequence[int], offset: float) -> list[int]:
    """Split `total` into whole numbers in proportion to `weights`, none above its limit.

    An entry whose part would exceed its limit gets its limit, and the others share the rest in proportion. The split is
    exact: the numbers add up to the total, none is above its limit, and each number below its limit is the exact part
    of the rest, rounded down or up.

    Args:
        total: number to split, at least 0 and at most the sum of the limits of positive weights.
        weights: weight of each entry, at least 0; some are above 0.
        limits: limit of each entry, at least 0.
        offset: number from 0 to below 1 that shifts which entries are rounded up. If it is drawn uniformly, the mean of
            each number is its exact part.
    """
    ratios = [w.as_integer_ratio() for w in map(float, weights)]
    scale = max(denominator for _, denominator in ratios)  # all are powers of two
    exact = [numerator * (scale // denominator) for numerator, denominator in ratios]
    counts, below = [0] * len(exact), [i for i, w in enumerate(exact) if w]
    while below:
        whole = sum(exact[i] for i in below)
        full = {i for i in below if total * exact[i] >= limits[i] * whole}
        if not full:
            break
        for i in full:
            counts[i] = limits[i]
        total -= sum(limits[i] for i in full)
        below = [i for i in below if i not in full]
    assert total == 0 or (below and total > 0), "the limits allow the total"
    if below:
        edge, numerator, denominator = 0, *offset.as_integer_ratio()
        reached = 0
        for i in below:
            edge += exact[i]
            up_to = (total * edge * denominator + whole * numerator) // (whole * denominator)
            counts[i] = up_to - reached
            reached = up_to
    return counts


@dataclass(frozen=True)
class MixedPhase:
    from_step: int
    steps: int
    by_size: list[float]
    tempered: list[float]
    weights: list[int]
    """Weight of each domain. `by_size` and `tempered` are shares by domain, too; each of them sums to 1."""

    @cached_property
    def shares(self) -> list[float]:
        """Shares of the domains after limits, summing to 1."""
        whole = sum(self.weights)
        return [w / whole for w in self.weights]


@dataclass(frozen=True)
class Mixture:
    domains: list[OrderedDomain]
    limits: list[int | None]
    """Number of samples that may be read of each domain, counting repeats; None for a domain without a limit."""
    phases: list[MixedPhase]
    samples_per_step: int
    order: Order

    def read(self, from_step: int, to_step: int) -> list[int]:
        """Return the number of samples of each domain that steps from_step .. to_step - 1 read."""
        before, after = (self.order.counts(step * self.samples_per_step) for step in (from_step, to_step))
        return [a - b for a, b in zip(after, before, strict=True)]


def mixture(spec: RunSpec, manifest: DataManifest) -> Mixture:
    """Return the mixture of all domains that fill at least one sample, in the order of names.

    Domains that no phase reads have share 0.

    Raises:
        DataError: a named domain has no sample, a source has none at all, or the limits leave steps without data.
    """
    names = sorted(name for name, d in manifest.domains.items() if d.samples and source_of(name) in spec.data.sources)
    domains = [OrderedDomain(name, source_of(name), manifest.domains[name].samples) for name in names]
    tokens = [manifest.domains[name].tokens for name in names]
    limits = _limits(spec, manifest, domains)
    begins = [step for step in spec.data.mixes if step < spec.train.steps]
    by_size, tempered = [], []
    for step in begins:
        mixes = spec.data.mixes[step]
        by_size.append(phase_shares(mixes, domains, tokens, flat=False))
        tempered.append(phase_shares(mixes, domains, tokens, flat=True))
    steps = [to - at for at, to in pairwise([*begins, spec.train.steps])]
    if any(limit is not None for limit in limits):
        positions = [n * spec.samples_per_step for n in steps]
        split = _split_limits(limits, positions, tempered)
        _check_limits(spec, begins, limits, tempered)
    else:
        positions = [MAX_WEIGHT] * len(steps)
        split = [[MAX_WEIGHT] * len(domains) for _ in steps]
    weights = [
        _deal(total, shares, domains, most, [seeded(spec.seed, f"rounding {i} {level}") / 2**64 for level in (0, 1)])
        for i, (total, shares, most) in enumerate(zip(positions, tempered, split, strict=True))
    ]
    phases = [MixedPhase(*row) for row in zip(begins, steps, by_size, tempered, weights, strict=True)]
    order = Order(spec.seed, domains, [Phase(p.from_step * spec.samples_per_step, p.weights) for p in phases])
    return Mixture(domains, limits, phases, spec.samples_per_step, order)


def training_order(spec: RunSpec, manifest: DataManifest) -> tuple[list[str], Order]:
    """Return the names of the mixture's domains and the order; domain i of the order is the i-th name of the list.

    Raises:
        DataError: the mixture is impossible, as for `mixture`.
    """
    mixed = mixture(spec, manifest)
    return [d.name for d in mixed.domains], mixed.order


def _limits(spec: RunSpec, manifest: DataManifest, domains: Sequence[OrderedDomain]) -> list[int | None]:
    for name, source in spec.data.sources.items():
        for sub in source.max_epochs_of:
            if f"{name}/{sub}" not in manifest.domains:
                why = f"there is no {name}/{sub} in the prepared data"
                raise DataError(f"data.sources.{name}.max_epochs_of", why, "name a subfolder of that source")
    limits: list[int | None] = []
    for domain in domains:
        source = spec.data.sources[domain.source]
        epochs = source.max_epochs_of.get(subfolder_of(domain.name), source.max_epochs)
        # As written: 0.29 epochs of 100 samples are 29, which is not so in binary.
        limits.append(None if epochs is None else int(Decimal(str(epochs)) * domain.samples))
    return limits


def phase_shares(
    mixes: dict[str, SourceMix], domains: Sequence[OrderedDomain], tokens: Sequence[int], *, flat: bool
) -> list[float]:
    """Return the share of each domain before limits, summing to 1.

    Args:
        mixes: the weight, shares and temperature of each source in the phase.
        domains: the domains, in the order of the result.
        tokens: number of tokens of each domain.
        flat: whether to apply the temperature, the exponent alpha.

    Raises:
        DataError: a domain with a fixed share, or every domain of a source, fills no sample.
    """
    result = [0.0] * len(domains)
    whole = fsum(mix.weight or 0 for mix in mixes.values())
    for name, mix in mixes.items():
        if not mix.weight:
            continue
        own = {subfolder_of(d.name): i for i, d in enumerate(domains) if d.source == name}
        if mix.shares:
            empty = sorted(mix.shares.keys() - own.keys())
            if empty:
                fix = "take it out of data.sources or give it more text"
                raise DataError(f"domain {name}/{empty[0]}", "it does not fill a single sample", fix)
            weights = mix.shares
        else:
            alpha = mix.alpha if flat and mix.alpha is not None else 1.0
            weights = {sub: _power(tokens[i], alpha) for sub, i in own.items()}
        if not weights:
            raise DataError(f"source {name}", "none of its domains fills a sample", "give it more text")
        norm = fsum(weights.values())
        for sub, w in weights.items():
            result[own[sub]] = mix.weight / whole * (w / norm)
    return result


def _power(base: int, exponent: float) -> float:
    """Return base^exponent, equal to the last bit on every machine.

    It does not use the C library, whose last bit differs between machines that must agree on an order.
    """
    return float(Context(prec=28).power(Decimal(base), Decimal(exponent)))


def _split_limits(
    limits: Sequence[int | None], positions: Sequence[int], shares: Sequence[Sequence[float]]
) -> list[list[int]]:
    """Split the limit of each domain over the phases; return the limits of the domains for each phase.

    A phase's part is in proportion to its positions times the domain's share in it, and the parts add up to the whole
    limit. A domain without a limit, or that no phase reads, is limited by the phase's positions only.
    """
    by_domain = []
    for limit, share in zip(limits, zip(*shares, strict=True), strict=True):
        asked = list(accumulate((n * s for n, s in zip(positions, share, strict=True)), initial=0.0))
        if limit is None or not asked[-1]:
            by_domain.append(list(positions))
        else:
            by_domain.append([to - at for at, to in pairwise(int(limit * (a / asked[-1])) for a in asked)])
    return [list(phase) for phase in zip(*by_domain, strict=True)]


def _check_limits(
    spec: RunSpec, begins: Sequence[int], limits: Sequence[int | None], shares: Sequence[Sequence[float]]
) -> None:
    def short_of(steps: int) -> tuple[int, int, int] | None:
        """Return the first phase with too few samples in a training of `steps` steps: its number, the samples that
        there are, and the samples wanted; None if all phases have enough."""
        bounds = [min(step, steps) for step in (*begins, steps)]
        positions = [(to - at) * spec.samples_per_step for at, to in pairwise(bounds)]
        for i, most in enumerate(_split_limits(limits, positions, shares)):
            there = sum(m for m, share in zip(most, shares[i], strict=True) if share)
            if there < positions[i]:
                return i, there, positions[i]
        return None

    steps = spec.train.steps
    found = short_of(steps)
    if found is None:
        return
    phase, there, wanted = found
    possible, too_many = 0, steps
    while too_many - possible > 1:
        middle = (possible + too_many) // 2
        possible, too_many = (possible, middle) if short_of(middle) else (middle, too_many)
    where = f" from step {begins[phase]} on" if len(begins) > 1 else ""
    why = f"max_epochs allows {there:,} samples{where}, and {wanted:,} are wanted"
    fix = f"set train.steps to {possible:,}, or raise max_epochs, or add text"
    raise DataError("mixture", why, fix if possible else "raise max_epochs, or add text")


def _deal(
    total: int,
    shares: Sequence[float],
    domains: Sequence[OrderedDomain],
    most: Sequence[int],
    offsets: Sequence[float],
) -> list[int]:
    """Split `total` into whole numbers by domain, first over the sources, then over the domains of each source.

    Args:
        total: number to split.
        shares: share of each domain.
        domains: the domains.
        most: limit of each domain.
        offsets: rounding offset for the sources, and the one for the domains of a source.
    """
    of_source: dict[str, list[int]] = {}
    for i, domain in enumerate(domains):
        if shares[i]:
            of_source.setdefault(domain.source, []).append(i)
    groups = list(of_source.values())
    by_source = apportion(
        total,
        [fsum(shares[i] for i in group) for group in groups],
        [sum(most[i] for i in group) for group in groups],
        offsets[0],
    )
    weights = [0] * len(domains)
    for part, group in zip(by_source, groups, strict=True):
        split = apportion(part, [shares[i] for i in group], [most[i] for i in group], offsets[1])
        for i, count in zip(group, split, strict=True):
            weights[i] = count
    return weights
