"""Is the chosen filter ever worse than no filter, CLIP score at its best budget, or misalignment at the run's own share?

    pytest tests/benchmarks/test_never_loses.py -m benchmark -s -k emoji-20-0   # two minutes
    make results                                                                # with the other tables of docs/results.md

Heads are fitted on what each rule keeps. The test is by another artist (`tests.benchmarks.support.corpora`).
"""

import pytest

from tests.benchmarks.support.comparison import assert_it_never_loses, compare, expected
from tests.benchmarks.support.corpora import CASES, solved
from tests.benchmarks.support.results import record

pytestmark = [pytest.mark.benchmark, pytest.mark.network]


@pytest.mark.parametrize(("name", "seed"), CASES, ids=lambda one: str(one))
def test_the_chosen_filter_never_loses(one_thread, name, seed):
    corpus = solved(name, seed)
    share = expected(name, seed, corpus.found, corpus.wrong)
    if name.startswith("clip-art"):
        share["truth"] = None  # it has bad titles of its own, which nobody counted
    compared = compare(corpus.found, corpus.wrong, corpus.tests)
    record("filters", f"{name} {seed}", corpus=name, **share, **compared)
    assert_it_never_loses(compared["losses"])
