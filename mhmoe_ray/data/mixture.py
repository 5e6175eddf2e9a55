"""Shares of domains and languages in training, from the spec and the prepared counts."""

from mhmoe_ray.data.manifest import DataManifest
from mhmoe_ray.data.order import Order
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec


def mixture(spec: DataSpec, manifest: DataManifest) -> dict[str, float]:
    """Share of each domain, adding up to 1.

    Within a source: its fixed `shares`, or q_i = p_i^alpha / sum_j p_j^alpha over token counts (XLM's rule).
    Domains too small to fill one sample are left out.

    Raises:
        DataError: a named domain has no sample, or a source has none at all.
    """
    result: dict[str, float] = {}
    total = sum(source.weight for source in spec.sources.values())
    for name, source in spec.sources.items():
        domains = {d.removeprefix(f"{name}/"): d for d in manifest.domains if d.startswith(f"{name}/")}
        filled = {sub: manifest.domains[d].tokens for sub, d in domains.items() if manifest.domains[d].samples}
        if source.shares:
            empty = sorted(source.shares.keys() - filled.keys())
            if empty:
                fix = "take it out of data.sources or give it more text"
                raise DataError(f"domain {name}/{empty[0]}", "it does not fill a single sample", fix)
            weights = source.shares
        else:
            weights = {sub: tokens**source.alpha for sub, tokens in filled.items()}
        if not weights:
            raise DataError(f"source {name}", "none of its domains fills a sample", "give it more text")
        norm = sum(weights.values())
        result |= {domains[sub]: source.weight / total * w / norm for sub, w in weights.items()}
    return result


def training_order(spec: DataSpec, manifest: DataManifest, seed: int) -> tuple[list[str], Order]:
    """The domains of the mixture and the order that deals from them; an order's domain i is the i-th of the list."""
    shares = mixture(spec, manifest)
    domains = sorted(shares)
    return domains, Order(seed, [manifest.domains[d].samples for d in domains], [shares[d] for d in domains])
