"""Is the chosen filter ever worse than no filter, CLIP score at its best budget, or misalignment at the run's own share?

    pytest tests/benchmarks/test_never_loses.py -m benchmark -s -k emoji-20-0   # two minutes
    make results                                                                # with the other tables of docs/results.md

Heads are fitted on what each rule keeps. The test is by another artist (`tests.benchmarks.support.corpora`).
"""

import pytest

from ecif.evaluation import auroc
from ecif.filter_choice import said
from tests.benchmarks.support.corpora import CASES, rules, solved
from tests.benchmarks.support.results import record

pytestmark = [pytest.mark.benchmark, pytest.mark.network]
WORSE = 0.01  # nats of test loss


@pytest.mark.parametrize(("name", "seed"), CASES, ids=lambda one: str(one))
def test_the_chosen_filter_never_loses(one_thread, name, seed):
    corpus = solved(name, seed)
    found, wrong = corpus.found, corpus.wrong
    told = found.chosen.misalignment
    truth, (low, high) = wrong.double().mean().item(), told.interval
    natural = name.startswith("clip-art")  # bad titles of its own, which nobody counted
    area = auroc(found.probability, wrong) if 0 < truth < 1 else None
    known = "unknown" if told.known_share is None else f"{told.known_share:.1%}"
    print(
        f"\n{name}, seed {seed}: {len(wrong)} pairs, {truth:.1%} wrong; expected {known}, {low:.1%} to {high:.1%}; AUROC {area}"
    )
    print(f"  {said(found.chosen.facts)}")
    losses = {}
    kept = rules(corpus)
    for rule, mask in kept.items():
        losses[rule] = corpus.test_loss(mask)
        shown = ", of names that the target lacks ".join(f"{loss:.3f}" for loss in losses[rule])
        print(f"  {rule:26s} keeps {mask.double().mean():6.1%}  test loss {shown}", flush=True)
    keeps = kept["chosen filter"].double().mean().item()
    facts = {"truth": None if natural else truth, "share": told.known_share, "interval": [low, high], "auroc": area}
    record("filters", f"{name} {seed}", corpus=name, losses=losses, keeps=keeps, **facts)
    others = [loss[0] for rule, loss in losses.items() if rule.startswith(("no filter", "cosine", "misalignment"))]
    assert losses["chosen filter"][0] <= min(others) + WORSE
    assert losses["chosen filter"][-1] <= losses["no filter"][-1] + WORSE
