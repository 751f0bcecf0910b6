"""The choice of a filter: what is tried, who has a say, and what evidence it takes to drop a pair."""

import pytest
import torch
from torch import Tensor

from ecif.columns.bank import build_bank
from ecif.columns.evidence import Evidence
from ecif.directions import Calibration, Directions
from ecif.filter_choice import (
    GROUPS,
    Candidate,
    ChosenFilter,
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
IMAGES, TEXTS = torch.randn(TARGET, 4, generator=G), torch.randn(TARGET, 4, generator=G)
SAMPLE = Sample(torch.randn(N, 4, generator=G), torch.randn(N, 4, generator=G), torch.arange(N) % 4, [N])
BANK = build_bank(SAMPLE.images, SAMPLE.texts, SAMPLE.fold, START)
QUESTION = deal("a", Contrastive(IMAGES, TEXTS), 10, 0)
INFLUENCE = torch.randn(PARTS, N, generator=G)  # on the parts of the target; nothing of which pairs are bad
HOW = HowToFilter([0.1], 2, 3)
LOSS, PLANTED = 3 + 4 * BAD + torch.randn(1, N, generator=G), 7 + torch.randn(1, N, generator=G)
EVIDENCE = Evidence(LOSS, PLANTED, torch.ones(N, dtype=torch.bool), BANK)  # bad pairs have a high loss


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


def directions(influence: Tensor = INFLUENCE) -> Directions:
    none = torch.zeros(0)
    calibration = Calibration(0.1, None, 0, [], [])
    return Directions(none, influence, torch.zeros(PARTS, N), none, calibration, 0.0, TEXTS, 1.0)


def chosen(refits: Refits, influence: Tensor = INFLUENCE) -> ChosenFilter:
    return choose_filter(QUESTION, SAMPLE, EVIDENCE, directions(influence), refits, HOW)


def test_every_candidate_is_fitted_without_a_say_of_each_part_and_the_first_two_once_more():
    found = chosen(refits := Refits())
    tried = [Candidate(*(one[key] for key in Candidate._fields)) for one in found.facts["tried"]]
    assert tried == HOW.candidates(tried[1].drop)
    assert [one.drop for one in tried] == sorted(one.drop for one in tried)
    assert len(refits.jobs) == HOW.fits(PARTS) == PARTS * (len(tried) * HOW.seeds + 2)
    first, again = refits.jobs[: PARTS * len(tried) * HOW.seeds], refits.jobs[PARTS * len(tried) * HOW.seeds :]
    assert [job.seed for job in first] == [3, 4] * (len(first) // 2)
    assert {job.seed for job in again} == {5}
    assert all(job.new_batches for job in refits.jobs)
    kept = [int(job.keep.sum()) for job in first[:: HOW.seeds]]
    assert kept == [round((1 - one.drop) * N) for one in tried] * PARTS


def test_random_pairs_are_dropped_beside_the_misaligned_ones_to_know_the_price_of_good_pairs():
    found = chosen(refits := Refits())
    names = [one["influence"] for one in found.facts["tried"]]
    alone, random = (refits.jobs[names.index(name, 1) * HOW.seeds].keep for name in ("none", "random"))
    assert not (random & ~alone).any()
    assert 0.02 * N < (alone & ~random).sum() < 0.2 * N


def test_a_part_that_judges_has_no_say_in_what_is_dropped():
    """Influence on the part that is held out plays no role, nor do its captions."""
    held = 1
    changed = INFLUENCE.clone()
    changed[held] = changed[held].flip(0)

    def masks(influence: Tensor) -> list[list[Tensor]]:
        chosen(refits := Refits(), influence)
        each = len(HOW.candidates(0.2)) * HOW.seeds
        return [[job.keep for job in refits.jobs[part * each : (part + 1) * each]] for part in range(PARTS)]

    before, after = masks(INFLUENCE), masks(changed)
    moved = [max(int((a ^ b).sum()) for a, b in zip(*of, strict=True)) for of in zip(before, after, strict=True)]
    # The share of misaligned pairs is learned with all of the target. It moves by hardly a pair.
    assert all(count <= 2 if part == held else count > 20 for part, count in enumerate(moved))


def test_where_only_bad_pairs_do_harm_they_go_and_influence_is_not_trusted():
    found = chosen(Refits())
    assert (found.facts["influence"], found.facts["weight"]) == ("none", 0.0)
    assert 0.75 < found.facts["keep"] < 0.85
    assert found.facts["gain"] > 2 * found.facts["error"]
    scores = found.scores(EVIDENCE.real.T, INFLUENCE.sum(0), torch.zeros(N))
    assert scores[BAD].mean() + 0.3 < scores[~BAD].mean()


def test_where_no_pair_does_harm_none_is_dropped():
    found = chosen(Refits(harm=0.0, good=1.0))
    assert found.facts["keep"] == 1
    assert said(found.facts).startswith("keep everything")


TRIED = HowToFilter([0.1], 1, 0).candidates(0.2)
EVERYTHING, ALONE, MILD, LEVEL, STRONG, MORE = 0, 1, 2, 3, 4, 5
RANDOM = next(i for i, one in enumerate(TRIED) if one.influence == "random")


def judged(asked: dict[int, float], held: dict[int, float], covered: float = 0.5, noise: float = 0.01) -> Judged:
    """Losses of 1 but for these; every group of target pairs says the same."""

    def table(of: dict[int, float]) -> Tensor:
        losses = torch.ones(len(TRIED), 1 + GROUPS, dtype=torch.float64)
        for i, loss in of.items():
            losses[i] = loss
        return losses

    return Judged(table(asked), table(held), covered, torch.full((2,), noise))


def test_a_gain_counts_by_the_share_that_the_target_asks_about_and_less_where_it_is_optimistic():
    found = judged({ALONE: 0.6}, {ALONE: 0.9}, covered=0.5, noise=0.02).gain(ALONE, EVERYTHING)
    assert found.gain == pytest.approx(0.25 * 0.5 * 0.4 + 0.5 * 0.1)
    assert found.error == pytest.approx(0.02 * ((0.25 * 0.5) ** 2 + 0.5**2) ** 0.5)


def test_the_error_is_that_of_a_jackknife_over_the_targets_pairs():
    values = torch.randn(GROUPS, 50, generator=G, dtype=torch.float64)  # gains of pairs, in equal groups
    losses = torch.zeros(2, 1 + GROUPS, dtype=torch.float64)
    losses[1, 0] = -values.mean()
    losses[1, 1:] = torch.stack([-torch.cat([values[:g], values[g + 1 :]]).mean() for g in range(GROUPS)])
    found = Judged(losses, losses, 0.0, torch.zeros(2)).gain(1, 0)
    assert found.gain == pytest.approx(values.mean().item())
    assert found.error == pytest.approx(values.mean(1).std().item() / GROUPS**0.5)


@pytest.mark.parametrize(
    ("asked", "held", "share", "choice"),
    [
        ({}, {}, 0.2, EVERYTHING),
        ({ALONE: 0.99}, {ALONE: 0.99}, 0.2, EVERYTHING),  # within noise
        ({ALONE: 0.8}, {ALONE: 0.8}, 0.2, ALONE),
        ({ALONE: 0.8}, {ALONE: 0.8}, 0.0, EVERYTHING),  # nothing is misaligned, or it is unknown what is
        ({ALONE: 0.8, MILD: 0.6}, {ALONE: 0.8, MILD: 0.81}, 0.2, ALONE),  # it serves only what it was asked for
        ({ALONE: 0.8, MILD: 0.7}, {ALONE: 0.8, MILD: 0.7}, 0.2, MILD),
        ({ALONE: 0.8, MILD: 0.7, STRONG: 0.69}, {ALONE: 0.8, MILD: 0.7, STRONG: 0.69}, 0.2, MILD),  # hardly better
        ({ALONE: 0.8, MILD: 0.7, STRONG: 0.5}, {ALONE: 0.8, MILD: 0.7, STRONG: 0.5}, 0.2, STRONG),
        ({ALONE: 0.8, MORE: 0.7, RANDOM: 0.9}, {ALONE: 0.8, MORE: 0.74, RANDOM: 0.9}, 0.2, ALONE),  # good pairs cost more
        ({ALONE: 0.8, MORE: 0.4, RANDOM: 0.9}, {ALONE: 0.8, MORE: 0.4, RANDOM: 0.9}, 0.2, MORE),
        ({MORE: 0.4}, {MORE: 0.4}, 0.0, MORE),  # the target knows of harm that is no misalignment
    ],
)
def test_only_what_gains_beyond_its_noise_is_chosen(asked, held, share, choice):
    losses = [dict.fromkeys(range(2, len(TRIED)), of.get(ALONE, 1.0)) | of for of in (asked, held)]
    assert choose_candidate(HowToFilter([0.1], 1, 0).candidates(share), judged(*losses), share) == choice


def test_a_pair_is_ranked_alike_in_whatever_shard_it_is():
    found = chosen(Refits())
    evidence, influence, near = EVIDENCE.real.T, INFLUENCE.sum(0), torch.rand(N)
    scores = found.scores(evidence, influence, near)
    assert torch.equal(found.scores(evidence[7:9], influence[7:9], near[7:9]), scores[7:9])


def test_a_user_reads_what_was_chosen_how_sure_it_is_and_what_the_target_does_not_ask_about():
    facts = {"influence": "residual", "weight": 0.3, "keep": 0.805, "gain": 0.1234, "error": 0.011, "asked": 0.6}
    line = said(facts)
    assert line.startswith("keep 80.5%, by misalignment, with influence 0.3")
    assert "0.123 ± 0.011 nats" in line
    assert "says nothing about 40% of the corpus" in line
