from collections import defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.inspect.copies import ENTRY, Copies, DomainCopies, count_copies, deal, hash_of
from mhmoe_ray.data.inspect.figures import EXAMPLES, Place

DOMAINS = ["web/a", "web/a", "web/b", "books/all"]
PATHS = ["/a/1", "/a/0", "/b/1", "/c"]  # not in the order of files

# Few texts, so that they meet; their copies differ in size by white space.
DOCUMENTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, len(PATHS) - 1), st.integers(10, 12)), max_size=60)


def entries_of(documents):
    rows = [(text * 2**60, file, line, size) for line, (text, file, size) in enumerate(documents, start=1)]
    return np.array(rows, ENTRY)


def without_longest(sizes) -> int:
    return sum(sum(each) - max(each) for each in sizes.values())


def plainly(documents) -> Copies:
    """Count the copies with plain dictionaries."""
    result, places, sizes = Copies(), defaultdict(list), defaultdict(list)
    of_domain = defaultdict(lambda: defaultdict(list))
    for line, (text, file, size) in enumerate(documents, start=1):
        places[text].append(Place(PATHS[file], line))
        sizes[text].append(size)
        of_domain[DOMAINS[file]][text].append(size)
    result.distinct, result.extra = len(places), len(documents) - len(places)
    result.extra_bytes = without_longest(sizes)
    for name, texts in of_domain.items():
        found = result.domains[name] = DomainCopies()
        found.distinct, found.extra = len(texts), sum(len(each) - 1 for each in texts.values())
        found.extra_bytes = without_longest(texts)
        found.elsewhere = sum(any(t in other for o, other in of_domain.items() if o != name) for t in texts)
    names = sorted(of_domain)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if both := len(of_domain[a].keys() & of_domain[b].keys()):
                result.pairs[f"{a}, {b}"] = both
    for at in places.values():
        at.sort(key=lambda place: (PATHS.index(place.path), place.line))
    several = sorted((-len(at), *at[:2]) for at in places.values() if len(at) > 1)
    result.most = [(-n, a, b) for n, a, b in several[:EXAMPLES]]
    return result


@given(DOCUMENTS, st.integers(1, 5))
def test_partitions_add_up_to_what_dictionaries_count(documents, partitions):
    found = Copies()
    dealt = deal(entries_of(documents), partitions)
    for _, part in dealt:
        found += count_copies(part, DOMAINS, PATHS)
    assert sum(len(part) for _, part in dealt) == len(documents)
    assert found == plainly(documents)


def test_white_space_does_not_make_a_text_another():
    assert hash_of("a b\n\n c".split()) == hash_of(" a\tb c\n".split()) != hash_of("ab c".split())
