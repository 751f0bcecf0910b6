"""Choose the filter of a target by refits, judged by target pairs that had no say.

There are two candidates:

- drop nothing;
- drop the run's own share of misaligned pairs, by misalignment.

The heads are refitted on what each candidate keeps. The target has three parts. In turn, two of them rank the pairs (they are
*asked*), and the third one is *held out*. What a refit loses on the asked parts is optimistic, because these pairs chose what
was dropped for them. What it loses on the held-out part is what happens to everything that a target does not name. A corpus has
both kinds of pairs: a share c whose captions the target asks about, and others. So

    M = OPTIMISM c (loss on the asked parts) + (1 - c) (loss on the held-out part)

Pairs are dropped if M is lower by more than ERRORS standard errors, and never more than the share. Heads on frozen trunks, and
target pairs by the same artists, reward larger budgets and a say of influence beside misalignment. Test sets from other sources
and models that are trained as a whole do not (docs/method.md).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecif.columns.evidence import Evidence
from ecif.columns.filter import best, order, quantiles
from ecif.columns.misalignment import NONE, Misalignment
from ecif.columns.near import asked_share
from ecif.directions import Directions
from ecif.heads import Heads
from ecif.heads.cross_fit import Refit, Refitter
from ecif.permutation import permutation
from ecif.sample import Sample
from ecif.targets.question import PARTS, Question

NOTHING, SHARE = range(2)  # the candidates
OPTIMISM = 0.25  # of a gain on the asked parts, so much counts: a test by another artist showed half of it
ERRORS = 2.0  # standard errors that a gain has to exceed
JUDGED = 512  # pairs of a part that judge a refit, as one batch
GROUPS = 6  # the standard error is that of a jackknife over as many groups of them
COUNTED = 1024  # pairs, and distinct captions, by which the share that the target asks about is found


class HowToFilter(NamedTuple):
    """How often candidates are refitted."""

    seeds: int  # fits of each candidate and held-out part, at least 2: their spread is a part of the uncertainty
    seed: int  # of the first fit; the next fit has the next seed

    def fits(self) -> int:
        """How many fits the choice takes at most."""
        return self.seeds * (1 + PARTS)


class Gain(NamedTuple):
    """How much lower M is if the share is dropped. Above 0 that is better."""

    gain: float  # nats a pair
    error: float  # standard error: of the target's pairs and of the refits

    @property
    def sure(self) -> bool:
        """Whether it is beyond its noise."""
        return self.gain > ERRORS * self.error


class Judged(NamedTuple):
    """Losses of all refits. A jackknife leaves out one group of the target's pairs at a time."""

    asked: Tensor  # [C, seeds, 1 + GROUPS] loss on the asked parts: with all groups, then without each; float64
    held: Tensor  # [C, seeds, 1 + GROUPS] on the held-out part
    covered: float  # c, the share of the corpus that the target asks about

    def gain(self) -> Gain:
        """By how much it is better to drop the share than nothing."""
        m = OPTIMISM * self.covered * self.asked + (1 - self.covered) * self.held
        gain = (m[NOTHING] - m[SHARE]).mean(0)
        jackknife = (GROUPS - 1) * (gain[1:] - gain[1:].mean()).square().mean()
        seeds = m.shape[1]
        refits = 2 * m[:, :, 0].var(1).mean() / seeds if seeds > 1 else torch.zeros(())  # alike for both candidates
        return Gain(gain[0].item(), math.sqrt(jackknife + refits))


class ChosenFilter(NamedTuple):
    """The order of pairs for one target, and how it was chosen how many are kept."""

    misalignment: Misalignment  # learned from evidence that includes the scores of this target only
    among: Tensor  # [QUANTILES] float64, quantiles of the sampled pairs' probabilities
    facts: dict[str, Any]  # what was chosen, how sure it is and what was tried, for run.json

    def scores(self, evidence: Tensor, influence: Tensor, agreement: Tensor) -> Tensor:
        """[N] float32 in 0 to 1: the higher its score, the earlier a pair is kept.

        Args:
            evidence: [N, E] scores of the pairs that count as evidence and depend on no target.
            influence: [N] influence of the pairs on the target.
            agreement: [N] agreement of the pairs with the target's.
        """
        of_target = torch.stack([influence, agreement], 1)
        return order(self.misalignment.probability(torch.cat([evidence, of_target], 1)).float(), self.among)


def choose_filter(
    question: Question, sample: Sample, evidence: Evidence, directions: Directions, refit: Refitter, how: HowToFilter
) -> ChosenFilter:
    """Refit the heads with every candidate, and choose.

    Args:
        question: the target.
        sample: the pairs that are ranked and refitted on.
        evidence: scores of the sampled pairs, real and planted.
        directions: the target's solved directions, with the influence of the sampled pairs on each part.
        refit: runs fits on parts of the sample.
        how: the number of refits.
    """
    captions, texts, centre = question.loss.captions(), sample.texts.float(), evidence.bank.text_centre
    count = len(question.parts)

    def misaligned(held: int) -> Tensor:
        """[N] probability of misalignment of the sampled pairs if one part of the target has no say."""
        return evidence.probability(directions.scores(without=held), directions.planted_scores(without=held))

    rows, distinct = permutation(len(texts), "asked share", how.seed)[:COUNTED], texts.unique(dim=0)
    compared = distinct[permutation(len(distinct), "captions", how.seed)[:COUNTED]]
    covered = asked_share(texts[rows], captions, centre, compared)
    misalignment = evidence.misalignment(directions.scores(), directions.planted_scores())
    share = misalignment.known_share or 0.0
    judged, drop = None, (share if share >= NONE else 0.0)
    if drop:
        everything = torch.ones(len(texts), dtype=torch.bool)
        kept = [everything, *(best(-misaligned(part), 1 - drop) for part in range(count))]
        jobs = [Refit(mask, how.seed + s, new_batches=True) for mask in kept for s in range(how.seeds)]
        losses = torch.stack([_losses(question, path[-1]) for path in refit(jobs)]).unflatten(0, (len(kept), how.seeds))
        nothing = losses[0].repeat(count, 1, 1, 1)  # it is the same fit, whoever is asked
        judged = _judged(torch.stack([nothing, losses[1:]], 1), covered)
    among = quantiles(misalignment.probability(evidence.of(directions.scores())))
    return ChosenFilter(misalignment, among, _facts(judged, drop, covered))


def choose_candidate(gain: Gain) -> int:
    """The share is dropped if that gains more than its noise.

    Where no heads are fitted, both losses are equal and nothing is judged: the share is dropped.
    """
    return SHARE if gain.sure or gain == Gain(0.0, 0.0) else NOTHING


def said(facts: dict[str, Any]) -> str:
    """One line for the user: what was chosen, how sure it is, and how much of the corpus the target says nothing about."""
    silent = f"the target says nothing about {1 - facts['asked']:.0%} of the corpus"
    if facts["keep"] == 1:
        why = (
            "no filter gains more than its noise" if facts["tried"] else "no share of misaligned pairs is known, or it is none"
        )
        return f"keep everything: {why}; {silent}"
    sure = f"gain {facts['gain']:.3f} ± {facts['error']:.3f} nats a pair, judged by target pairs that had no say"
    sure = sure if facts["error"] else "not judged, because no fit improves on the checkpoint's heads"
    return f"keep {facts['keep']:.1%} by misalignment; {sure}; {silent}"


def _losses(question: Question, heads: Heads) -> Tensor:
    """[parts, 1 + GROUPS] mean loss of each part, with all its pairs and without each group; float64.

    The losses without a group are NaN for a part with too few pairs: no error is known then, and no gain is sure.
    """
    table = []
    for rows in question.rows:
        rows = rows[:JUDGED]
        groups = rows.tensor_split(GROUPS)
        without = [torch.cat([*groups[:g], *groups[g + 1 :]]) for g in range(GROUPS)]
        enough = len(rows) >= 2 * GROUPS
        table.append([question.mean_loss(heads, some) if enough or some is rows else math.nan for some in [rows, *without]])
    return torch.tensor(table, dtype=torch.float64)


def _judged(losses: Tensor, covered: float) -> Judged:
    """Sort losses [held, C, seeds, part, 1 + GROUPS] by whether a part was asked or held out; mean over what is held out."""
    count = len(losses)
    held = torch.stack([losses[part, ..., part, :] for part in range(count)])
    asked = (losses.sum(3) - held) / (count - 1)
    return Judged(asked.mean(0), held.mean(0), covered)


def _facts(judged: Judged | None, drop: float, covered: float) -> dict[str, Any]:
    if not judged:
        return {"keep": 1.0, "gain": 0.0, "error": 0.0, "asked": covered, "tried": []}
    keep, gain = (1.0, 1 - drop), judged.gain()
    asked, held = (losses[:, :, 0].mean(1).tolist() for losses in (judged.asked, judged.held))
    tried = [{"keep": keep[i], "asked_loss": asked[i], "held_loss": held[i]} for i in (NOTHING, SHARE)]
    chosen = choose_candidate(gain)
    best = gain if chosen == SHARE else Gain(0.0, 0.0)
    return {"keep": keep[chosen], "gain": best.gain, "error": best.error, "asked": covered, "tried": tried}
