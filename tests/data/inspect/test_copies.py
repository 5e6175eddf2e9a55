from collections import defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.inspect.copies import ENTRY_DTYPE, Copies, DomainCopies, count_copies, partition_entries, text_hash
from mhmoe_ray.data.inspect.figures import EXAMPLES, TextLocation

DOMAINS = ["web/a", "web/a", "web/b", "books/all"]
PATHS = ["/a/1", "/a/0", "/b/1", "/c"]  # not sorted, so that the order of files differs from that of paths

# A document is the number of its text, the index of its file, and its size. There are few texts, so that some documents
# are copies. The sizes of copies differ, because white space may differ.
DOCUMENTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, len(PATHS) - 1), st.integers(10, 12)), max_size=60)


def make_entries(documents):
    rows = [(text * 2**60, file, line, size) for line, (text, file, size) in enumerate(documents, start=1)]
    return np.array(rows, ENTRY_DTYPE)


def extra_bytes(sizes_by_text) -> int:
    return sum(sum(text_sizes) - max(text_sizes) for text_sizes in sizes_by_text.values())


def count_copies_plainly(documents) -> Copies:
    """Count the copies with plain dictionaries, as a reference for `count_copies`.

    A document is the number of its text, the index of its file, and its size in bytes.
    """
    result, locations_by_text, sizes_by_text = Copies(), defaultdict(list), defaultdict(list)
    sizes_by_domain = defaultdict(lambda: defaultdict(list))
    for line, (text, file, size) in enumerate(documents, start=1):
        locations_by_text[text].append(TextLocation(PATHS[file], line))
        sizes_by_text[text].append(size)
        sizes_by_domain[DOMAINS[file]][text].append(size)
    result.distinct, result.extra = len(locations_by_text), len(documents) - len(locations_by_text)
    result.extra_bytes = extra_bytes(sizes_by_text)
    for name, texts in sizes_by_domain.items():
        domain_copies = result.domains[name] = DomainCopies()
        domain_copies.distinct, domain_copies.extra = (
            len(texts),
            sum(len(text_sizes) - 1 for text_sizes in texts.values()),
        )
        domain_copies.extra_bytes = extra_bytes(texts)
        domain_copies.shared_texts = sum(
            any(t in other_texts for other_name, other_texts in sizes_by_domain.items() if other_name != name)
            for t in texts
        )
    names = sorted(sizes_by_domain)
    for i, first_name in enumerate(names):
        for second_name in names[i + 1 :]:
            if shared_count := len(sizes_by_domain[first_name].keys() & sizes_by_domain[second_name].keys()):
                result.pairs[f"{first_name}, {second_name}"] = shared_count
    for locations in locations_by_text.values():
        locations.sort(key=lambda location: (PATHS.index(location.path), location.line))
    repeated_texts = sorted(
        (-len(locations), *locations[:2]) for locations in locations_by_text.values() if len(locations) > 1
    )
    result.most_copied = [
        (-n, first_location, second_location) for n, first_location, second_location in repeated_texts[:EXAMPLES]
    ]
    return result


@given(DOCUMENTS, st.integers(1, 5))
def test_copies_of_partitions_add_up(documents, partitions):
    result = Copies()
    entries_by_partition = partition_entries(make_entries(documents), partitions)
    for _, entries in entries_by_partition:
        result += count_copies(entries, DOMAINS, PATHS)
    assert sum(len(entries) for _, entries in entries_by_partition) == len(documents)
    assert result == count_copies_plainly(documents)


def test_text_hash_ignores_white_space():
    assert text_hash("a b\n\n c".split()) == text_hash(" a\tb c\n".split()) != text_hash("ab c".split())
