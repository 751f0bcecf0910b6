"""The edge that is found by counting is that of a sorted list."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.results import edges as counting
from pipeline.results.edges import Keys, find_edges

WORD = st.one_of(st.integers(0, 3), st.sampled_from([2**64 - 1, 2**63, 2**63 - 1, 2**40 + 1, 2**40]))
PAIR = st.tuples(st.integers(0, 2), st.integers(0, 255), WORD)  # group, and a key of 8 and 64 bits


@given(
    parts=st.lists(st.lists(PAIR, max_size=12), max_size=5), shares=st.tuples(*[st.floats(0, 1)] * 3), digit=st.integers(1, 16)
)
@settings(deadline=None, max_examples=200)
def test_of_each_group_exactly_the_lowest_are_kept(parts, shares, digit):
    pairs = [pair for part in parts for pair in part]
    sizes = [sum(group == g for group, _, _ in pairs) for g in range(3)]
    count = [round(share * size) for share, size in zip(shares, sizes, strict=True)]
    ranked = sorted(range(len(pairs)), key=lambda i: (pairs[i][1:], i))
    kept = {i for g in range(3) for i in [j for j in ranked if pairs[j][0] == g][: count[g]]}

    def read(words: int) -> list[Keys]:
        columns = [np.array(part, np.uint64).reshape(-1, 3) for part in parts]
        return [Keys([part[:, 1 + w] for w in range(words)], part[:, 0].astype(np.int64)) for part in columns]

    before, counting.DIGIT = counting.DIGIT, digit
    try:
        edges = find_edges(read, [8, 64], np.array(count))
    finally:
        counting.DIGIT = before
    found = np.concatenate([np.empty(0, bool), *edges.kept(read(len(edges.words)))])
    assert found.tolist() == [i in kept for i in range(len(pairs))]


@pytest.mark.parametrize(
    ("values", "count", "words"), [([5, 1, 4, 2, 3], 3, 1), ([5, 1, 2, 2, 3], 2, 2), ([1, 2, 2, 9, 9], 3, 1), ([1, 1], 0, 1)]
)
def test_further_words_are_read_only_where_ties_are_split(values, count, words):
    asked = []

    def read(count: int) -> list[Keys]:
        asked.append(count)
        every = [np.array(values, np.uint64), np.arange(len(values), dtype=np.uint64)]
        return [Keys(every[:count], np.zeros(len(values), np.int64))]

    edges = find_edges(read, [32, 64], np.array([count]))
    assert len(edges.words) == max(asked) == words
