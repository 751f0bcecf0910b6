"""Choose the filter of a target by refits.

Each candidate drops pairs, and the heads are refitted on the rest. The loss on both halves of the target decides.
`ecif.columns.filter` explains why there are two halves.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecif.columns.evidence import Evidence
from ecif.columns.filter import Candidate, Ranking, candidates, choose_candidate, keep_mask, ranking
from ecif.columns.misalignment import Misalignment
from ecif.directions import Directions
from ecif.heads.cross_fit import Refit, Refitter
from ecif.targets.question import Question


class HowToFilter(NamedTuple):
    """The candidates, and the number of refits of each."""

    weights: list[float]  # candidate weights of influence, 0 to 1
    keep: list[float]  # candidate shares of the pairs to keep
    seeds: int  # fits of each candidate and half
    seed: int  # of the first fit; the next fit has the next seed

    def fits(self) -> int:
        """How many fits the choice takes."""
        return 2 * len(candidates(self.weights, self.keep)) * self.seeds


class ChosenFilter(NamedTuple):
    """The ranking of pairs for one target, and how it was chosen."""

    ranking: Ranking
    misalignment: Misalignment  # learned from evidence that includes influence on this target only
    facts: dict[str, Any]  # the chosen weight and share to keep, and the loss of every candidate

    def scores(self, evidence: Tensor, influence: Tensor) -> Tensor:
        """[N] float32 in 0 to 1: the higher its score, the earlier a pair is kept.

        Args:
            evidence: [N, E] scores of the pairs that count as evidence, without influence.
            influence: [N] influence of the pairs on the target.
        """
        probability = self.misalignment.probability(torch.cat([evidence, influence[:, None]], 1)).float()
        return self.ranking.scores(probability, influence)


def choose_filter(
    question: Question, evidence: Evidence, directions: Directions, refit: Refitter, how: HowToFilter
) -> ChosenFilter:
    """Refit the heads with every candidate filter, and choose by the mean loss on both halves of the target.

    Args:
        question: the target.
        evidence: scores of the sampled pairs, real and planted.
        directions: the target's solved directions, with the influence of the sampled pairs on each half.
        refit: runs fits on parts of the sample.
        how: the candidates and the number of refits.
    """
    misalignment = evidence.misalignment(directions.influence[None], directions.planted[None])

    def keep(half: int, candidate: Candidate) -> Tensor:
        influence = 2 * directions.halves[half]  # doubled: half a target has about half its loss
        return keep_mask(misalignment.probability(evidence.of(influence[None])), influence, candidate)

    tried = candidates(how.weights, how.keep)
    masks = [keep(half, candidate) for half in range(2) for candidate in tried]
    jobs = [Refit(mask, how.seed + seed, new_batches=True) for mask in masks for seed in range(how.seeds)]
    halves = [torch.cat(half) for half in question.halves]
    losses = [[question.mean_loss(path[-1], rows) for rows in halves] for path in refit(jobs)]
    judged = torch.tensor(losses, dtype=torch.float64).view(2, len(tried), how.seeds, 2).mean((0, 2, 3))
    share = misalignment.known_share
    choice = choose_candidate(how.weights, how.keep, judged, None if share is None else 1 - share)
    table = [c._asdict() | {"loss": loss} for c, loss in zip(tried[1:], judged[1:].tolist(), strict=True)]
    facts = choice._asdict() | {"loss_of_everything": judged[0].item(), "tried": table}
    probability = misalignment.probability(evidence.of(directions.influence[None]))
    return ChosenFilter(ranking(probability, directions.influence, choice.weight), misalignment, facts)
