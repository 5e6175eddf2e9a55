"""The text that a tokenizer is trained on: a sample in the proportions that training reads.

    budgets      domains by the mixture of the first phase that reads them, never more than they have; then a domain's
                 files by size. Sizes are those of the stored files; what is compressed counts as three times that.
    files        evenly spread, as many as leave each one MIN_FILE characters to give and hold four times the budget;
                 all of them, where these are not enough
    documents    those of the smallest hashes among the first REACH budgets of a file; of other hashes than those that
                 hold documents out, or these would be what the tokenizer knows best

So the sample depends on names, sizes and texts alone, a file up to REACH times its budget is sampled from beginning to
end, and neither memory nor reading grows with the corpus.
"""

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Iterator

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.order.apportion import apportion
from mhmoe_ray.data.order.mixture import phase_shares
from mhmoe_ray.data.order.order import OrderedDomain
from mhmoe_ray.data.sources import Document, RawFile, Reading
from mhmoe_ray.spec import DataSpec

MIN_FILE = 50_000
REACH = 64


def sample_texts(files: list[RawFile], spec: DataSpec) -> Iterator[str]:
    """About `spec.tokenizer_train_mb` million characters, documents of one file after another."""
    for file, characters in file_budgets(files, spec):
        yield from _sample(file, spec, characters)


def file_budgets(files: list[RawFile], spec: DataSpec) -> list[tuple[RawFile, int]]:
    """The files to read and how many characters to take of each."""
    by_domain: dict[str, list[RawFile]] = defaultdict(list)
    for file in files:
        by_domain[file.domain].append(file)
    budgets = domain_budgets({name: sum(map(_size, own)) for name, own in by_domain.items()}, spec)
    result = []
    for name, own in by_domain.items():
        count, chosen = max(1, budgets[name] // MIN_FILE), own
        while count < len(own):
            chosen = [own[i * len(own) // count] for i in range(count)]
            if sum(map(_size, chosen)) >= 4 * budgets[name]:
                break
            count, chosen = 2 * count, own
        sizes = [_size(file) for file in chosen]
        total = min(budgets[name], sum(sizes))
        parts = apportion(total, sizes, sizes, 0.5) if total else []
        result += [(file, part) for file, part in zip(chosen, parts, strict=bool(parts)) if part]
    return result


def domain_budgets(sizes: dict[str, int], spec: DataSpec) -> dict[str, int]:
    """Characters to take of each domain.

    Args:
        sizes: characters that there are of each.
        spec: says how they are mixed; a domain that its first phase does not read counts as in the first one that does.
    """
    names = sorted(sizes)
    domains = [OrderedDomain(name, source_of(name), 0) for name in names]
    weights = [0.0] * len(names)
    for mixes in spec.mixes.values():
        shares = phase_shares(mixes, domains, [max(1, sizes[name]) for name in names], flat=True)
        weights = [before or now for before, now in zip(weights, shares, strict=True)]
    limits = [sizes[name] if weight else 0 for name, weight in zip(names, weights, strict=True)]
    total = min(int(spec.train_mb * 1e6), sum(limits))
    return dict(zip(names, apportion(total, weights, limits, 0.5), strict=True))


def _size(file: RawFile) -> int:
    return file.size * file.inflation


def _sample(file: RawFile, spec: DataSpec, characters: int) -> Iterator[str]:
    kept: list[tuple[int, int, str]] = []  # a heap: the largest hash first
    size = passed = 0
    for item in Reading(file, spec):
        if not isinstance(item, Document):
            continue  # counted where it matters, when the file is tokenised
        digest = hashlib.blake2b(item.text.encode(), digest_size=8, person=b"tokenizer").digest()
        heapq.heappush(kept, (-int.from_bytes(digest, "big"), item.line, item.text))
        size += len(item.text)
        while size - len(kept[0][2]) >= characters:
            size -= len(heapq.heappop(kept)[2])
        passed += len(item.text)
        if passed >= REACH * characters:
            break
    for _, _, text in sorted(kept, reverse=True):
        yield text[:characters]
        characters -= len(text)
