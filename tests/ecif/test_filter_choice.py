"""The choice of a filter: which half ranks for which fit, what judges it, and how the chosen one ranks pairs of any shard."""

import pytest
import torch
from torch import Tensor

from ecif.columns.bank import build_bank
from ecif.columns.evidence import Evidence
from ecif.columns.filter import Candidate, candidates, keep_mask
from ecif.directions import Calibration, Directions
from ecif.filter_choice import ChosenFilter, HowToFilter, choose_filter
from ecif.heads import Heads
from ecif.heads.cross_fit import Refit
from ecif.targets import Contrastive
from ecif.targets.question import deal

N = 200
G = torch.Generator().manual_seed(0)
BAD = torch.arange(N) % 5 == 0
START = Heads(torch.eye(4), torch.eye(4), 1.0)
BANK = build_bank(torch.eye(4), torch.eye(4), torch.arange(4), START)
IMAGES, TEXTS = torch.randn(40, 4, generator=G), torch.randn(40, 4, generator=G)
QUESTION = deal("a", Contrastive(IMAGES, TEXTS), 10, 0)
INFLUENCE = torch.randn(2, N, generator=G)  # on both halves of the target; nothing of which pairs are bad
HOW = HowToFilter([0.0, 0.5, 1.0], [0.9, 0.7], 2, 3)
LOSS, PLANTED = 3 + 4 * BAD + torch.randn(1, N, generator=G), 7 + torch.randn(1, N, generator=G)
EVIDENCE = Evidence(LOSS, PLANTED, torch.ones(N, dtype=torch.bool), BANK)  # bad pairs have a high loss


class Refits:
    """Runs nothing: heads that are the better, the fewer bad pairs they were fitted on; remembers what was asked."""

    def __call__(self, jobs: list[Refit]) -> list[list[Heads]]:
        self.jobs = jobs
        return [[START, START._replace(image=self.blurred(job.keep))] for job in jobs]

    @staticmethod
    def blurred(keep: Tensor) -> Tensor:
        """Weights under which an image's embedding is nearer to its caption's where few bad pairs are kept."""
        return torch.linalg.lstsq(IMAGES, TEXTS).solution + (keep & BAD).sum() / BAD.sum() * 3 * torch.eye(4).flip(0)


def directions(influence: Tensor = INFLUENCE) -> Directions:
    none = torch.zeros(0)
    return Directions(none, influence, torch.zeros(N), none, Calibration(0.1, None, 0, [], []), 0.0, 1.0)


def chosen(refits: Refits, influence: Tensor = INFLUENCE, how: HowToFilter = HOW) -> ChosenFilter:
    return choose_filter(QUESTION, EVIDENCE, directions(influence), refits, how)


def masks(influence: Tensor = INFLUENCE) -> list[list[Tensor]]:
    """The pairs that each half's candidates keep, one mask a candidate."""
    chosen(refits := Refits(), influence)
    keep = [job.keep for job in refits.jobs[:: HOW.seeds]]
    return [keep[: len(keep) // 2], keep[len(keep) // 2 :]]


def test_every_candidate_is_fitted_for_both_halves_with_every_seed_in_new_batches():
    chosen(refits := Refits())
    tried = candidates(HOW.weights, HOW.keep)
    assert len(refits.jobs) == HOW.fits() == 2 * len(tried) * HOW.seeds
    assert [job.seed for job in refits.jobs] == [3, 4] * (len(refits.jobs) // 2)
    assert all(job.new_batches for job in refits.jobs)
    assert [int(keep.sum()) for keep in masks()[0]] == [round(c.keep * N) for c in tried]
    assert all(torch.equal(refits.jobs[i].keep, refits.jobs[i + 1].keep) for i in range(0, len(refits.jobs), 2))


def test_without_influence_the_misaligned_go_first_and_with_nothing_else_the_harmful():
    for half, keep in enumerate(masks()):
        by_candidate = dict(zip(candidates(HOW.weights, HOW.keep), keep, strict=True))
        assert (by_candidate[Candidate(0.0, 0.7)] & BAD).sum() < 0.2 * BAD.sum()
        harmful = by_candidate[Candidate(1.0, 0.7)]
        assert INFLUENCE[half][~harmful].max() <= INFLUENCE[half][harmful].min()


def test_a_candidate_knows_nothing_of_the_half_that_has_not_asked():
    """But for misalignment, which is learned with the influence on the whole target."""
    turned = torch.stack([INFLUENCE[0], INFLUENCE[1].flip(0)])
    before, after = masks(), masks(turned)
    harmful = candidates(HOW.weights, HOW.keep).index(Candidate(1.0, 0.7))
    assert torch.equal(before[0][harmful], after[0][harmful])
    assert not torch.equal(before[1][harmful], after[1][harmful])


def test_both_halves_judge_every_refit_and_the_mean_over_seeds_and_halves_decides():
    found = chosen(refits := Refits())
    rows = [torch.cat(half) for half in QUESTION.halves]
    losses: dict[int, list[float]] = {}
    tried = candidates(HOW.weights, HOW.keep)
    for i, job in enumerate(refits.jobs):
        heads = START._replace(image=Refits.blurred(job.keep))
        losses.setdefault(i // HOW.seeds % len(tried), []).extend(QUESTION.mean_loss(heads, half) for half in rows)
    means = [sum(of) / len(of) for of in losses.values()]
    assert found.facts["loss_of_everything"] == pytest.approx(means[0])
    assert [one["loss"] for one in found.facts["tried"]] == pytest.approx(means[1:])
    assert [(one["weight"], one["keep"]) for one in found.facts["tried"]] == tried[1:]


def test_where_only_bad_pairs_do_harm_they_go_and_influence_is_not_trusted():
    found = chosen(Refits())
    assert (found.facts["weight"], found.facts["keep"]) == (0.0, 0.7)
    assert found.facts["loss"] < 0.98 * found.facts["loss_of_everything"]
    scores = found.scores(EVIDENCE.real.T, INFLUENCE.sum(0))
    assert scores[BAD].mean() + 0.3 < scores[~BAD].mean()


def test_a_pair_is_ranked_alike_in_whatever_shard_it_is_and_a_sampled_pair_as_the_candidate_ranked_it():
    found = chosen(Refits())
    evidence, influence = EVIDENCE.real.T, INFLUENCE.sum(0)
    scores = found.scores(evidence, influence)
    assert torch.equal(found.scores(evidence[7:9], influence[7:9]), scores[7:9])
    probability = found.misalignment.probability(EVIDENCE.of(influence[None]))
    keep = keep_mask(probability, influence, Candidate(found.facts["weight"], 0.7))
    assert scores[keep].min() >= scores[~keep].max() - 1e-3
