"""The rules that filters are compared by: what each keeps, what heads lose that are fitted on it, and what the run expects."""

import torch
from torch import Tensor

from ecif.columns.filter import best
from ecif.evaluation import auroc
from ecif.filter_choice import said
from tests.benchmarks.support.in_memory import Solved
from tests.benchmarks.support.results import Record

ENOUGH = 512  # right pairs that an oracle can be fitted on: two batches
WORSE = 0.01  # nats of test loss


def rules(found: Solved, wrong: Tensor) -> dict[str, Tensor]:
    """The pairs [N] that each rule keeps."""
    share = found.chosen.misalignment.known_share or 0.0
    cosine = found.evidence.real[1]  # cross-fitted: these heads start at random, so the checkpoint's own says nothing
    kept = {
        "no filter": torch.ones(len(wrong), dtype=torch.bool),
        **{f"cosine, keep {1 - drop:.0%}": best(cosine, 1 - drop) for drop in (0.05, 0.1, 0.2)},
        "misalignment, own share": best(-found.probability, 1 - share),
        "chosen filter": best(-found.probability, found.chosen.facts["keep"]),
    }
    return kept | ({"oracle": ~wrong} if wrong.any() and (~wrong).sum() >= ENOUGH else {})


def expected(title: str, seed: int, found: Solved, wrong: Tensor) -> Record:
    """Print and return how many pairs the run expects to be misaligned, beside the truth, and what it chose."""
    told, truth = found.chosen.misalignment, wrong.double().mean().item()
    area = auroc(found.probability, wrong) if 0 < truth < 1 else None
    known = "unknown" if told.known_share is None else f"{told.known_share:.1%}"
    low, high = told.interval
    print(f"\n{title}, seed {seed}: {len(wrong)} pairs, {truth:.1%} wrong, AUROC {area}")
    print(f"  expects {known} misaligned, {low:.1%} to {high:.1%}")
    print(f"  {said(found.chosen.facts)}", flush=True)
    return {"truth": truth, "share": told.known_share, "interval": [low, high], "auroc": area}


def compare(found: Solved, wrong: Tensor, tests: list[tuple[Tensor, Tensor]]) -> Record:
    """Print and return what heads lose on each test set that are fitted on what each rule keeps, and what the filter keeps."""
    losses, known = {}, dict[bytes, list[float]]()
    kept = rules(found, wrong)
    for rule, mask in kept.items():
        key = mask.numpy().tobytes()  # two rules may keep the same pairs
        known[key] = known.get(key) or [found.test_loss(mask, *test) for test in tests]
        losses[rule] = known[key]
        shown = ", of names that the target lacks ".join(f"{loss:.3f}" for loss in losses[rule])
        print(f"  {rule:26s} keeps {mask.double().mean():6.1%}  test loss {shown}", flush=True)
    return {"losses": losses, "keeps": kept["chosen filter"].double().mean().item()}


def assert_it_never_loses(losses: dict[str, list[float]]) -> None:
    """The last test set is of names that the target lacks, if there are two."""
    others = [loss[0] for rule, loss in losses.items() if rule.startswith(("no filter", "cosine", "misalignment"))]
    assert losses["chosen filter"][0] <= min(others) + WORSE
    assert losses["chosen filter"][-1] <= losses["no filter"][-1] + WORSE
