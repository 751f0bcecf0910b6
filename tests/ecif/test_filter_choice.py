"""The choice of a filter: what is tried, who has a say, and what evidence it takes to drop a pair."""

import pytest
import torch
from torch import Tensor

from ecif.columns.bank import build_bank
from ecif.columns.evidence import Evidence
from ecif.directions import Calibration, Directions
from ecif.filter_choice import (
    ERRORS,
    GROUPS,
    NOTHING,
    OPTIMISM,
    SHARE,
    ChosenFilter,
    Gain,
    HowToFilter,
    Judged,
    choose_candidate,
    choose_filter,
    said,
)
from ecif.heads import Heads
from ecif.heads.cross_fit import Refit
from ecif.sample import Sample
from ecif.targets import Contrastive
from ecif.targets.question import PARTS, deal

N, TARGET = 400, 90
G = torch.Generator().manual_seed(0)
BAD = torch.arange(N) % 5 == 0
START = Heads(torch.eye(4), torch.eye(4), 1.0)
IMAGES = torch.randn(TARGET, 4, generator=G)
TEXTS = IMAGES @ torch.randn(4, 4, generator=G) + 0.1 * torch.randn(TARGET, 4, generator=G)
SAMPLE = Sample(torch.randn(N, 4, generator=G), torch.randn(N, 4, generator=G), torch.arange(N) % 4, [N])
BANK = build_bank(SAMPLE.images, SAMPLE.texts, SAMPLE.fold, START)
QUESTION = deal("a", Contrastive(IMAGES, TEXTS), 10, 0)
MOVES = torch.randn(PARTS, N, generator=G)  # on the parts of the target; nothing of which pairs are bad
SAYS_NOTHING = torch.zeros(1 + PARTS, N)  # agreement with the target, and with it without each part
HOW = HowToFilter(2, 3)
LOSS, PLANTED = 3 + 4 * BAD + torch.randn(1, N, generator=G), 7 + torch.randn(1, N, generator=G)
EVIDENCE = Evidence(LOSS, PLANTED, torch.ones(N, dtype=torch.bool), SAMPLE.fold, BANK)  # bad pairs have a high loss


class Refits:
    """Runs nothing: heads that are the better, the fewer bad pairs they were fitted on; remembers what was asked."""

    def __init__(self, harm: float = 3.0, good: float = 0.1):
        self.harm, self.good, self.jobs = harm, good, list[Refit]()

    def __call__(self, jobs: list[Refit]) -> list[list[Heads]]:
        self.jobs = jobs
        return [[START, START._replace(image=self.blurred(job.keep))] for job in jobs]

    def blurred(self, keep: Tensor) -> Tensor:
        """Weights under which an image's embedding is nearer to its caption's where few bad and many good pairs are kept."""
        bad, lost = (keep & BAD).sum() / BAD.sum(), (~keep & ~BAD).sum() / (~BAD).sum()
        return torch.linalg.lstsq(IMAGES, TEXTS).solution + (self.harm * bad + self.good * lost) * torch.eye(4).flip(0)


def directions(influence: Tensor = MOVES, agreement: Tensor = SAYS_NOTHING) -> Directions:
    none, planted = torch.zeros(0), torch.zeros(PARTS, N)
    calibration = Calibration(0.1, None, 0, [], [])
    bank = BANK, agreement, torch.zeros(1 + PARTS, N)
    return Directions(none, influence, planted, none, calibration, 0.0, TEXTS, *bank, 1.0)


def chosen(refits: Refits, influence: Tensor = MOVES, agreement: Tensor = SAYS_NOTHING) -> ChosenFilter:
    return choose_filter(QUESTION, SAMPLE, EVIDENCE, directions(influence, agreement), refits, HOW)


def masks(influence: Tensor = MOVES, agreement: Tensor = SAYS_NOTHING) -> list[Tensor]:
    """The pairs that are kept when each part of the target judges."""
    chosen(refits := Refits(), influence, agreement)
    return [job.keep for job in refits.jobs[HOW.seeds :: HOW.seeds]]


def changed(before: list[Tensor], after: list[Tensor]) -> list[int]:
    """By how many pairs each of them differs."""
    return [int((a ^ b).sum()) for a, b in zip(before, after, strict=True)]


def test_every_candidate_is_fitted_for_every_part_that_is_held_out_with_every_seed():
    found = chosen(refits := Refits())
    assert len(refits.jobs) == HOW.fits() == (1 + PARTS) * HOW.seeds
    assert [job.seed for job in refits.jobs] == [3, 4] * (1 + PARTS)
    assert all(job.new_batches for job in refits.jobs)
    kept = [int(job.keep.sum()) for job in refits.jobs[:: HOW.seeds]]
    nothing, share = [round(one["keep"] * N) for one in found.facts["tried"]]
    assert kept == [nothing, *[share] * PARTS]
    assert nothing == N > share


def test_a_part_that_judges_has_no_say_in_what_is_dropped():
    """Influence on the part that is held out plays no role."""
    held = 1
    telling = MOVES - 2 * BAD
    blind = telling.clone()
    blind[held] = telling[held].flip(0)
    # The share of misaligned pairs is learned with all of the target. It moves by hardly a pair.
    moved = changed(masks(telling), masks(blind))
    assert all(count <= 2 if part == held else count > 4 for part, count in enumerate(moved))


def test_a_part_that_judges_vouches_for_no_pair():
    """What is dropped when a part judges depends on the agreement with the target without that part, and on no other."""
    held = 1
    telling = torch.randn(1 + PARTS, N, generator=G) - 2 * BAD
    blind = telling.clone()
    blind[1 + held] = telling[1 + held].flip(0)
    moved = changed(masks(agreement=telling), masks(agreement=blind))
    assert all(count > 4 if part == held else count == 0 for part, count in enumerate(moved))


def test_where_only_bad_pairs_do_harm_they_go():
    found = chosen(Refits())
    assert 0.75 < found.facts["keep"] < 0.85
    assert found.facts["gain"] > 2 * found.facts["error"]
    scores = found.scores(EVIDENCE.real.T, MOVES.sum(0), torch.zeros(N))
    assert scores[BAD].mean() + 0.3 < scores[~BAD].mean()


def test_where_no_pair_does_harm_none_is_dropped():
    found = chosen(Refits(harm=0.0, good=1.0))
    assert found.facts["keep"] == 1
    assert said(found.facts).startswith("keep everything")


def test_without_a_known_share_nothing_is_fitted_and_nothing_dropped():
    same = EVIDENCE._replace(planted=EVIDENCE.real[:, torch.randperm(N, generator=G)])
    refits = Refits()
    found = choose_filter(QUESTION, SAMPLE, same, directions(), refits, HOW)
    assert (found.facts["keep"], refits.jobs) == (1.0, [])
    assert "no share of misaligned pairs is known" in said(found.facts)


def losses(*of: float, noise: float = 0.0) -> Tensor:
    """Of both candidates with two seeds; every group of target pairs says the same."""
    table = torch.tensor(of, dtype=torch.float64)[:, None, None].repeat(1, 2, 1 + GROUPS)
    table[:, 0] += noise
    table[:, 1] -= noise
    return table


def test_a_gain_counts_by_the_share_that_the_target_asks_about_and_less_where_it_is_optimistic():
    found = Judged(losses(1, 0.6), losses(1, 0.9), 0.3).gain()
    assert found.gain == pytest.approx(OPTIMISM * 0.3 * 0.4 + 0.7 * 0.1)
    assert found.error == pytest.approx(0)


def test_the_error_is_that_of_the_targets_pairs_and_of_the_refits():
    """Against the error of a mean over groups, and the spread of seeds by simulation."""
    values = torch.randn(GROUPS, 50, generator=G, dtype=torch.float64)  # gains of pairs, in equal groups
    table = losses(0, 0)
    table[SHARE, :, 0] = -values.mean()
    table[SHARE, :, 1:] = torch.stack([-torch.cat([values[:g], values[g + 1 :]]).mean() for g in range(GROUPS)])
    found = Judged(table, table, 0.0).gain()
    assert found.gain == pytest.approx(values.mean().item())
    assert found.error == pytest.approx(values.mean(1).std().item() / GROUPS**0.5)
    simulated = []
    for _ in range(400):
        table = 0.1 * torch.randn(2, 2, 1, generator=G, dtype=torch.float64).repeat(1, 1, 1 + GROUPS)
        simulated.append(Judged(table, table, 0.0).gain())
    spread = torch.tensor([one.gain for one in simulated]).std().item()
    error = torch.tensor([one.error for one in simulated]).square().mean().sqrt().item()
    assert error == pytest.approx(spread, rel=0.15)
    assert spread == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("asked", "held", "choice"),
    [
        ((1, 1), (1, 1.01), NOTHING),
        ((1, 0.99), (1, 0.99), NOTHING),  # within noise
        ((1, 0.8), (1, 0.8), SHARE),
        ((1, 0.8), (1, 1.1), NOTHING),  # it serves only what was asked
        ((1, 1.2), (1, 1.2), NOTHING),
    ],
)
def test_only_what_gains_beyond_its_noise_is_chosen(asked, held, choice):
    assert ERRORS == 2
    assert choose_candidate(Judged(losses(*asked, noise=0.02), losses(*held, noise=0.02), 0.5).gain()) == choice


def test_a_gain_without_an_error_is_not_sure():
    assert choose_candidate(Gain(0.5, float("nan"))) == NOTHING


def test_where_nothing_is_fitted_nothing_is_judged_and_misalignment_decides_alone():
    found = choose_filter(QUESTION, SAMPLE, EVIDENCE, directions(), lambda jobs: [[START] for _ in jobs], HOW)
    assert 0.75 < found.facts["keep"] < 0.85
    assert "not judged" in said(found.facts)


def test_a_target_too_small_to_know_its_noise_drops_nothing():
    few = deal("a", Contrastive(IMAGES[:20], TEXTS[:20]), 10, 0)
    found = choose_filter(few, SAMPLE, EVIDENCE, directions(), Refits(), HOW)
    assert found.facts["keep"] == 1


def test_a_pair_is_ranked_alike_in_whatever_shard_it_is():
    found = chosen(Refits())
    columns = EVIDENCE.real.T, MOVES.sum(0), torch.rand(N)
    assert torch.equal(found.scores(*(of[7:9] for of in columns)), found.scores(*columns)[7:9])


def test_a_user_reads_what_was_chosen_how_sure_it_is_and_what_the_target_does_not_ask_about():
    facts = {"keep": 0.805, "gain": 0.1234, "error": 0.011, "asked": 0.6, "tried": [{}]}
    line = said(facts)
    assert line.startswith("keep 80.5% by misalignment; gain")
    assert "0.123 ± 0.011 nats" in line
    assert "says nothing about 40% of the corpus" in line
