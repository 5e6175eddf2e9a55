import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.order.interleaver import MAX_WEIGHT
from mhmoe_ray.data.order.order import Order, OrderedDomain, Phase
from tests.data.order.plain_order import DOMAIN_ERROR, SOURCE_ERROR, plain_order

SEEDS = st.integers(0, 2**32)


@st.composite
def small_mixtures(draw, max_samples=40, max_phase_length=200):
    """Draw up to seven domains of up to three sources, and up to four phases with small weights, some of them zero.

    No phase has more positions than the sum of its weights, which `Order` requires.
    """
    samples = draw(st.lists(st.integers(1, max_samples), min_size=1, max_size=7))
    domains = [OrderedDomain(f"d{i}", draw(st.sampled_from("abc")), n) for i, n in enumerate(samples)]
    weights = st.lists(st.integers(0, 30), min_size=len(samples), max_size=len(samples)).filter(any)
    phases, start = [], 0
    for row in draw(st.lists(weights, min_size=1, max_size=4)):
        phases.append(Phase(start, row))
        start += draw(st.integers(1, min(max_phase_length, sum(row))))
    return domains, phases


@settings(max_examples=150)
@given(SEEDS, small_mixtures())
def test_order_equals_the_plain_loop(seed, mixture):
    order = Order(seed, *mixture)
    domain, sample = order(np.arange(order.position_count))
    expected = list(plain_order(seed, *mixture, order.position_count))
    assert list(zip(domain.tolist(), sample.tolist(), strict=True)) == expected
    for position in {0, 1, order.position_count // 2, order.position_count, *(p.start for p in mixture[1])}:
        assert order.domain_counts(position) == np.bincount(domain[:position], minlength=len(mixture[0])).tolist()


@st.composite
def large_mixtures(draw):
    """Draw large domains, and phases of up to 10^13 positions, in each of which the domains' weights add up to 2^50.

    Some weights are tiny.
    """
    size = draw(st.integers(1, 12))
    domains = [OrderedDomain(f"d{i}", draw(st.sampled_from("abc")), draw(st.integers(1, 10**9))) for i in range(size)]
    exponents = st.lists(st.floats(-9, 0), min_size=size, max_size=size)
    phases, start = [], 0
    for row in draw(st.lists(exponents, min_size=1, max_size=3)):
        shares = 10 ** np.array(row)
        weights = [int(w) for w in shares / shares.sum() * 2**49]
        weights[0] += MAX_WEIGHT - sum(weights)
        phases.append(Phase(start, weights))
        start += draw(st.integers(1, 10**13))
    return domains, phases


@settings(max_examples=60)
@given(SEEDS, large_mixtures(), st.integers(0, 10**14), st.integers(1, 500))
def test_order_is_the_same_for_any_choice_of_positions(seed, mixture, start, length):
    order = Order(seed, *mixture)
    position = np.arange(start, start + length)
    domain, sample = order(position)
    for p in (0, length // 2, length - 1):
        assert tuple(x[0] for x in order(position[p : p + 1])) == (domain[p], sample[p])
    shuffled = np.random.default_rng(0).permutation(length)
    assert np.array_equal(order(position[shuffled])[1], sample[shuffled])
    counts = np.subtract(order.domain_counts(start + length), order.domain_counts(start))
    assert np.array_equal(counts, np.bincount(domain, minlength=len(mixture[0])))
    assert all(0 <= s < mixture[0][d].samples for d, s in zip(domain, sample, strict=True))


@settings(max_examples=60)
@given(SEEDS, large_mixtures(), st.integers(0, 10**13))
def test_order_keeps_shares_at_every_prefix_of_a_phase(seed, mixture, distance):
    domains, phases = mixture
    order = Order(seed, domains, phases)
    source = np.array([d.source for d in domains])
    for phase, end in zip(phases, [*(p.start for p in phases[1:]), order.position_count], strict=True):
        shares = np.array(phase.weights) / MAX_WEIGHT
        prefix_length = min(3000, end - phase.start)
        domain, _ = order(np.arange(phase.start, phase.start + prefix_length))
        read_counts = np.cumsum(domain[:, None] == np.arange(len(domains)), axis=0)
        lengths = np.arange(1, prefix_length + 1)
        far_length = min(distance, end - phase.start)
        read_counts = np.vstack(
            [read_counts, np.subtract(order.domain_counts(phase.start + far_length), order.domain_counts(phase.start))]
        )
        error = read_counts - np.outer([*lengths, far_length], shares)
        assert np.abs(error).max() < DOMAIN_ERROR
        for s in set(source):
            assert np.abs(error[:, source == s].sum(1)).max() < SOURCE_ERROR


@settings(max_examples=30)
@given(SEEDS, small_mixtures())
def test_order_reads_each_sample_once_per_epoch(seed, mixture):
    order = Order(seed, *mixture)
    domain, sample = order(np.arange(order.position_count))
    for d, (_, _, size) in enumerate(mixture[0]):
        domain_samples = sample[domain == d]
        for epoch in range(len(domain_samples) // size):
            assert sorted(domain_samples[epoch * size : (epoch + 1) * size]) == list(range(size))
        last_epoch = domain_samples[len(domain_samples) // size * size :]
        assert len(set(last_epoch)) == len(last_epoch)


def test_order_spreads_small_shares_of_many_domains():
    rng = np.random.default_rng(0)
    weights = [MAX_WEIGHT // 10**6] * 999
    weights.append(MAX_WEIGHT - sum(weights))
    domains = [OrderedDomain(f"s{i % 7}/{i}", f"s{i % 7}", int(rng.integers(1, 10**6))) for i in range(1000)]
    order = Order(5, domains, [Phase(0, weights)])
    counts = np.array(order.domain_counts(3 * 10**12))
    assert np.abs(counts - np.array(weights) / MAX_WEIGHT * 3 * 10**12).max() < DOMAIN_ERROR
    # A stretch of a million positions has about one sample of each of the 999 small domains.
    domain, _ = order(np.arange(10**12, 10**12 + 10**6))
    read_counts = np.bincount(domain, minlength=1000)
    assert np.abs(read_counts[:999] - 1).max() <= DOMAIN_ERROR
    # The samples of these domains are spread over the stretch.
    rare_positions = np.sort(np.flatnonzero(domain < 999))
    assert np.histogram(rare_positions, bins=10, range=(0, 10**6))[0].min() > 50


def test_order_skips_domains_without_weight_and_repeats_a_single_sample():
    domains = [OrderedDomain("none", "a", 10), OrderedDomain("one", "a", 1), OrderedDomain("many", "b", 1000)]
    order = Order(0, domains, [Phase(0, [0, 1, 3]), Phase(3, [0, 0, 5])])
    domain, sample = order(np.arange(8))
    assert 0 not in domain
    assert (domain[3:] == 2).all()
    assert (sample[domain == 1] == 0).all()


def test_order_within_a_domain_is_independent_of_the_mixture():
    a, b = OrderedDomain("s/a", "s", 500), OrderedDomain("s/b", "s", 77)
    expected = Order(4, [a], [Phase(0, [3000])])(np.arange(3000))[1]
    domain, sample = Order(4, [b, a], [Phase(0, [300, 700]), Phase(500, [9, 1000])])(np.arange(1500))
    assert np.array_equal(sample[domain == 1], expected[: (domain == 1).sum()])


def test_order_differs_between_seeds():
    domains = [OrderedDomain(name, "s", 1000) for name in "abc"]
    (d1, s1), (d2, s2) = (Order(seed, domains, [Phase(0, [50, 31, 19])])(np.arange(100)) for seed in (7, 8))
    assert (d1 != d2).any()
    assert np.mean(s1 == s2) < 0.05


def test_order_mixes_the_shards_of_a_domain_in_a_batch():
    """The 256 samples of a batch come, on average, from as many of a domain's 40 shards as random draws would.

    The order is not correlated with the place in the domain, and counts by shard vary as in random draws.
    """
    size, shards, batch = 40_000, 40, 256
    domains = [OrderedDomain("a", "s", size), OrderedDomain("b", "s", size)]
    order = Order(1, domains, [Phase(0, [size, size])])
    domain, sample = order(np.arange(2 * size))
    for d in (0, 1):
        domain_samples = sample[domain == d]
        # `domain_samples` and the positions are permutations of the same numbers, so this is Spearman's rank
        # correlation.
        rank_correlation = np.corrcoef(domain_samples, np.arange(size))[0, 1]
        assert abs(rank_correlation) < 4 / np.sqrt(size)
        shards_by_batch = domain_samples[: size // batch * batch].reshape(-1, batch) // (size // shards)
        mean_distinct_shards = np.mean([len(set(row)) for row in shards_by_batch])
        expected_distinct_shards = shards * (1 - (1 - 1 / shards) ** batch)
        assert abs(mean_distinct_shards - expected_distinct_shards) < 0.1
        shard_counts = np.stack([np.bincount(row, minlength=shards) for row in shards_by_batch])
        variance = batch / shards * (1 - 1 / shards)
        assert 0.9 < shard_counts.var(0).mean() / variance < 1.1


def test_order_equals_its_golden_values():
    """The order equals golden values, because a run that a later version resumes must read the same samples."""
    domains = [OrderedDomain("a/x", "a", 1000), OrderedDomain("a/y", "a", 77), OrderedDomain("b/z", "b", 5)]
    phases = [Phase(0, [600, 300, 100]), Phase(500, [2**40, 2**39, 2**38])]
    domain, sample = Order(3, domains, phases)(np.r_[496:504, 10**9 : 10**9 + 4])
    assert (domain.tolist(), sample.tolist()) == GOLDEN


GOLDEN = ([0, 1, 0, 0, 1, 2, 0, 0, 0, 1, 0, 0], [652, 18, 292, 35, 33, 1, 844, 380, 883, 74, 647, 417])
