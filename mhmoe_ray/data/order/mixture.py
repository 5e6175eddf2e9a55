"""Mixture weights: the shares in which a training reads the domains, phase by phase, from the spec and the data.

    by size      W_s p_i: the source's weight, divided over its subfolders by their tokens (of an encoder, by their
                 samples), or by fixed shares
    tempered     W_s q_i, q_i = p_i^alpha / sum_j p_j^alpha (XLM's rule); fixed shares stay unchanged
    weights      the mixture weights: the tempered shares, limited by `max_epochs`, as whole numbers for the order

At most floor(max_epochs * samples) samples of a domain may be read in the whole training, with those of earlier runs
whose order the run continues. The limit is divided over the phases in proportion to the samples that they would read
without limits. Samples that a domain cannot provide go to the other domains of its source in proportion, or to other
sources if all of these are at their limits.

Without any `max_epochs`, the weights of a phase are shares out of 2^50, so a longer training begins with the same order
as a shorter one. With `max_epochs`, they add up to the phase's positions, so that limits are exact to the sample, and
the order depends on `train.steps`.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from itertools import accumulate, pairwise
from math import fsum

from mhmoe_ray.data.domains import source_of, subfolder_of
from mhmoe_ray.data.draws import seeded_hash
from mhmoe_ray.data.order.interleaver import MAX_WEIGHT
from mhmoe_ray.data.order.order import Order, OrderedDomain, PartedOrder, Phase
from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import MicroBatchPart, RunSpec, SourceMix


def apportion(total: int, weights: Sequence[float], limits: Sequence[int], offset: float) -> list[int]:
    """Split `total` into integers in proportion to `weights`, each at most its limit.

    Entries whose share would exceed their limit get the limit, and the others divide the rest exactly, rounded up or
    down. `offset` in [0, 1) determines which are rounded up; if it is drawn uniformly, the mean of each number is its
    exact share. The limits of positive weights must allow the total.
    """
    # The weights are scaled to integers so that the split is exact. The scaling is exact too, because the denominators
    # of floats are powers of two.
    ratios = [w.as_integer_ratio() for w in map(float, weights)]
    scale = max(denominator for _, denominator in ratios)
    exact_weights = [numerator * (scale // denominator) for numerator, denominator in ratios]
    counts, open_entries = [0] * len(exact_weights), [i for i, w in enumerate(exact_weights) if w]
    # Each round sets the entries that reach their limits to these limits. The rest goes to fewer entries, so more of
    # them may reach their limits in the next round.
    while open_entries:
        weight_sum = sum(exact_weights[i] for i in open_entries)
        full_entries = {i for i in open_entries if total * exact_weights[i] >= limits[i] * weight_sum}
        if not full_entries:
            break
        for i in full_entries:
            counts[i] = limits[i]
        total -= sum(limits[i] for i in full_entries)
        open_entries = [i for i in open_entries if i not in full_entries]
    assert total == 0 or (open_entries and total > 0), "the limits allow the total"
    if open_entries:
        # Rounding the cumulative sums instead of the parts makes the parts add up to the total.
        cumulative_weight, numerator, denominator = 0, *offset.as_integer_ratio()
        previous_count = 0
        for i in open_entries:
            cumulative_weight += exact_weights[i]
            cumulative_count = (total * cumulative_weight * denominator + weight_sum * numerator) // (
                weight_sum * denominator
            )
            counts[i] = cumulative_count - previous_count
            previous_count = cumulative_count
    return counts


@dataclass(frozen=True)
class MixturePhase:
    """Phase of a training with constant shares; the lists have an entry for each domain and sum to 1."""

    from_step: int
    steps: int
    by_size: list[float]
    """Shares before temperature and limits."""
    tempered: list[float]
    """Shares after temperature and before limits."""
    shares: list[float]
    """Shares after temperature and limits."""


@dataclass(frozen=True)
class Mixture:
    """Domains of a training, their limits, the phases, and the order of samples."""

    domains: list[OrderedDomain]
    limits: list[int | None]
    """Samples, with repeats, that this run may read of each domain; None without a limit."""
    samples_before: list[int]
    """Samples of each domain that earlier runs have read, whose order this run continues."""
    phases: list[MixturePhase]
    samples_per_step: int
    order: Order | PartedOrder

    def samples_read(self, from_step: int, to_step: int) -> list[int]:
        """Return the samples of each domain that steps from_step .. to_step - 1 read."""
        start_counts, end_counts = (
            self.order.domain_counts(step * self.samples_per_step) for step in (from_step, to_step)
        )
        return [a - b for a, b in zip(end_counts, start_counts, strict=True)]


def compute_mixture(spec: RunSpec, manifest: DataManifest, samples_before: Mapping[str, int] | None = None) -> Mixture:
    """Return the mixture of a training, with all domains that fill at least one sample, sorted by name.

    A domain that no phase reads has share 0. With parts of micro-batches, the shares are those of all parts together.
    `samples_before` counts each domain's samples that earlier runs have read, if the run continues their order
    (`start.order`); limits include them. A DataError says that a domain with a fixed share or a whole source fills no
    sample, that `max_epochs_of` names an unknown subfolder, or that the limits leave steps without data.
    """
    mixtures = [_compute_part(spec, part, manifest, samples_before) for part in spec.parts]
    return mixtures[0] if len(mixtures) == 1 else _combine_parts(spec, mixtures)


def _compute_part(
    spec: RunSpec, part: MicroBatchPart, manifest: DataManifest, samples_before: Mapping[str, int] | None
) -> Mixture:
    names = sorted(name for name, d in manifest.domains.items() if d.samples and source_of(name) in part.sources)
    domains = [OrderedDomain(name, source_of(name), manifest.domains[name].samples) for name in names]
    sizes = [manifest.domains[name].size for name in names]
    first_slots = [(samples_before or {}).get(name, 0) for name in names]
    limits = _domain_limits(spec, part, manifest, domains, first_slots)
    samples_per_step = spec.train.micro_batches * part.samples
    # Each step at which the mixture changes starts a phase. A phase that starts after the end of the training is left
    # out.
    phase_starts = [step for step in spec.data.mixes if step < spec.train.steps]
    by_size, tempered = [], []
    for step in phase_starts:
        mixes = {name: mix for name, mix in spec.data.mixes[step].items() if name in part.sources}
        by_size.append(phase_shares(mixes, domains, sizes, apply_temperature=False))
        tempered.append(phase_shares(mixes, domains, sizes, apply_temperature=True))
    _check_experts(spec, names, tempered)
    steps = [stop - start for start, stop in pairwise([*phase_starts, spec.train.steps])]
    # If `max_epochs` limits a domain, the weights must add up to the number of positions, so that the limits are exact.
    # Without limits, a fixed total is used, so that a longer training begins with the same order as a shorter one.
    if any(limit is not None for limit in limits):
        positions = [n * samples_per_step for n in steps]
        split_limits = _split_limits(limits, positions, tempered)
        _check_limits(spec, part, phase_starts, limits, tempered)
    else:
        positions = [MAX_WEIGHT] * len(steps)
        split_limits = [[MAX_WEIGHT] * len(domains) for _ in steps]
    weights = [
        _split_by_source(
            total,
            shares,
            domains,
            phase_limits,
            [seeded_hash(spec.seed, f"rounding {i} {level}") / 2**64 for level in (0, 1)],
        )
        for i, (total, shares, phase_limits) in enumerate(zip(positions, tempered, split_limits, strict=True))
    ]
    shares = [[w / sum(phase_weights) for w in phase_weights] for phase_weights in weights]
    phases = [MixturePhase(*row) for row in zip(phase_starts, steps, by_size, tempered, shares, strict=True)]
    order_phases = [
        Phase(step * samples_per_step, phase_weights) for step, phase_weights in zip(phase_starts, weights, strict=True)
    ]
    order = Order(spec.seed, domains, order_phases, first_slots)
    return Mixture(domains, limits, first_slots, phases, samples_per_step, order)


def _combine_parts(spec: RunSpec, mixtures: Sequence[Mixture]) -> Mixture:
    sizes = [part.samples for part in spec.parts]
    # Each row is a pair: the number of a part, and the number of a domain in that part. Rows are sorted by domain name.
    rows = sorted(
        ((part, number) for part, mixture in enumerate(mixtures) for number in range(len(mixture.domains))),
        key=lambda row: mixtures[row[0]].domains[row[1]].name,
    )
    numbers = {row: number for number, row in enumerate(rows)}
    domains_of_parts = [
        [numbers[part, number] for number in range(len(mixture.domains))] for part, mixture in enumerate(mixtures)
    ]

    def join_shares(shares: Sequence[Sequence[float]]) -> list[float]:
        return [shares[part][number] * sizes[part] / sum(sizes) for part, number in rows]

    phases = [
        MixturePhase(
            part_phases[0].from_step,
            part_phases[0].steps,
            join_shares([phase.by_size for phase in part_phases]),
            join_shares([phase.tempered for phase in part_phases]),
            join_shares([phase.shares for phase in part_phases]),
        )
        for part_phases in zip(*(mixture.phases for mixture in mixtures), strict=True)
    ]
    orders = [mixture.order for mixture in mixtures if isinstance(mixture.order, Order)]
    return Mixture(
        [mixtures[part].domains[number] for part, number in rows],
        [mixtures[part].limits[number] for part, number in rows],
        [mixtures[part].samples_before[number] for part, number in rows],
        phases,
        spec.samples_per_step,
        PartedOrder(orders, sizes, domains_of_parts),
    )


def _check_experts(spec: RunSpec, names: Sequence[str], phase_shares: Sequence[Sequence[float]]) -> None:
    moe = spec.model.moe
    if moe is None or moe.router != "domain":
        return
    for name, shares in zip(names, zip(*phase_shares, strict=True), strict=True):
        if any(shares) and moe.expert_of_domain(name) is None:
            fix = f"add {name} or {source_of(name)} to it, or set the weight of the source to 0"
            raise DataError(f"domain {name}", "no expert of model.moe.domains is for it", fix)


def training_order(
    spec: RunSpec, manifest: DataManifest, samples_before: Mapping[str, int] | None = None
) -> tuple[list[str], Order | PartedOrder]:
    """Return the names of the domains, by their number in the order, and the order, as in `compute_mixture`."""
    order_mixture = compute_mixture(spec, manifest, samples_before)
    return [d.name for d in order_mixture.domains], order_mixture.order


def _domain_limits(
    spec: RunSpec,
    part: MicroBatchPart,
    manifest: DataManifest,
    domains: Sequence[OrderedDomain],
    samples_before: Sequence[int],
) -> list[int | None]:
    """Return the samples of each domain that `max_epochs` still allows."""
    for name in part.sources:
        for subfolder in spec.data.sources[name].max_epochs_of:
            if f"{name}/{subfolder}" not in manifest.domains:
                reason = f"there is no {name}/{subfolder} in the prepared data"
                raise DataError(f"data.sources.{name}.max_epochs_of", reason, "name a subfolder of that source")
    limits: list[int | None] = []
    for domain, read_count in zip(domains, samples_before, strict=True):
        source = spec.data.sources[domain.source]
        epochs = source.max_epochs_of.get(subfolder_of(domain.name), source.max_epochs)
        if epochs is None:
            limits.append(None)
            continue
        # Decimal arithmetic uses exactly the number that the spec has: 0.29 epochs of 100 samples are 29 samples. With
        # binary floats they would be 28.
        allowed_count = int(Decimal(str(epochs)) * domain.samples)
        if read_count > allowed_count:
            reason = (
                f"the run that it continues has read {read_count:,} samples, and max_epochs allows {allowed_count:,}"
            )
            raise DataError(f"domain {domain.name}", reason, "raise max_epochs, or set start.order to new")
        limits.append(allowed_count - read_count)
    return limits


def phase_shares(
    mixes: dict[str, SourceMix], domains: Sequence[OrderedDomain], sizes: Sequence[int], *, apply_temperature: bool
) -> list[float]:
    """Return each domain's share in one phase before limits.

    `sizes` has each domain's tokens, or samples for an encoder. A DataError says that a domain with a fixed share, or
    every domain of a source, fills no sample.
    """
    result = [0.0] * len(domains)
    weight_sum = fsum(mix.weight or 0 for mix in mixes.values())
    for name, mix in mixes.items():
        if not mix.weight:
            continue
        domain_of_subfolder = {subfolder_of(d.name): i for i, d in enumerate(domains) if d.source == name}
        if mix.shares:
            empty_subfolders = sorted(mix.shares.keys() - domain_of_subfolder.keys())
            if empty_subfolders:
                fix = "take it out of data.sources or give it more text"
                raise DataError(f"domain {name}/{empty_subfolders[0]}", "it does not fill a single sample", fix)
            weights = mix.shares
        else:
            alpha = mix.alpha if apply_temperature and mix.alpha is not None else 1.0
            weights = {subfolder: _power(sizes[i], alpha) for subfolder, i in domain_of_subfolder.items()}
        if not weights:
            raise DataError(f"source {name}", "none of its domains fills a sample", "give it more text")
        share_sum = fsum(weights.values())
        for subfolder, share in weights.items():
            result[domain_of_subfolder[subfolder]] = mix.weight / weight_sum * (share / share_sum)
    return result


def _power(base: int, exponent: float) -> float:
    """Return base^exponent with equal bits on every machine; the C library's power differs in the last bit."""
    return float(Context(prec=28).power(Decimal(base), Decimal(exponent)))


def _split_limits(
    limits: Sequence[int | None], positions: Sequence[int], shares: Sequence[Sequence[float]]
) -> list[list[int]]:
    """Return the domains' limits for each phase, in proportion to positions times share.

    A domain without a limit, or one that no phase reads, is limited by the phase's positions only.
    """
    by_domain = []
    for limit, share in zip(limits, zip(*shares, strict=True), strict=True):
        cumulative_reads = list(accumulate((n * s for n, s in zip(positions, share, strict=True)), initial=0.0))
        if limit is None or not cumulative_reads[-1]:
            by_domain.append(list(positions))
        else:
            by_domain.append(
                [
                    stop - start
                    for start, stop in pairwise(int(limit * (a / cumulative_reads[-1])) for a in cumulative_reads)
                ]
            )
    return [list(phase) for phase in zip(*by_domain, strict=True)]


def _check_limits(
    spec: RunSpec,
    part: MicroBatchPart,
    phase_starts: Sequence[int],
    limits: Sequence[int | None],
    shares: Sequence[Sequence[float]],
) -> None:
    """Raise DataError if a phase has too few samples; it names the longest training that the limits allow."""

    def find_shortage(steps: int) -> tuple[int, int, int] | None:
        """Return the first phase with too few samples, with its available and required ones."""
        phase_bounds = [min(step, steps) for step in (*phase_starts, steps)]
        positions = [(stop - start) * spec.train.micro_batches * part.samples for start, stop in pairwise(phase_bounds)]
        for i, phase_limits in enumerate(_split_limits(limits, positions, shares)):
            available = sum(limit for limit, share in zip(phase_limits, shares[i], strict=True) if share)
            if available < positions[i]:
                return i, available, positions[i]
        return None

    steps = spec.train.steps
    shortage = find_shortage(steps)
    if shortage is None:
        return
    phase, available, required = shortage
    # The number of possible step counts before the first one with a shortage is the longest training.
    feasible_steps = bisect_left(range(1, steps), True, key=lambda count: find_shortage(count) is not None)
    phase_text = f" from step {phase_starts[phase]} on" if len(phase_starts) > 1 else ""
    reason = f"max_epochs allows {available:,} samples{phase_text}, and {required:,} are needed"
    fix = f"set train.steps to {feasible_steps:,}, or raise max_epochs, or add text"
    subject = f"mixture of part {part.name}" if part.name else "mixture"
    raise DataError(subject, reason, fix if feasible_steps else "raise max_epochs, or add text")


def _split_by_source(
    total: int,
    shares: Sequence[float],
    domains: Sequence[OrderedDomain],
    limits: Sequence[int],
    offsets: Sequence[float],
) -> list[int]:
    """Split `total` by domain, first over the sources; `offsets` has one for sources, one for domains."""
    domains_by_source: dict[str, list[int]] = {}
    for i, domain in enumerate(domains):
        if shares[i]:
            domains_by_source.setdefault(domain.source, []).append(i)
    groups = list(domains_by_source.values())
    # The total is split over the sources first, so that other domains of the same source replace the samples that a
    # domain cannot provide.
    source_totals = apportion(
        total,
        [fsum(shares[i] for i in group) for group in groups],
        [sum(limits[i] for i in group) for group in groups],
        offsets[0],
    )
    weights = [0] * len(domains)
    for source_total, group in zip(source_totals, groups, strict=True):
        domain_counts = apportion(source_total, [shares[i] for i in group], [limits[i] for i in group], offsets[1])
        for i, count in zip(group, domain_counts, strict=True):
            weights[i] = count
    return weights
