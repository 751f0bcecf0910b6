"""Choose the filter of a target by refits, judged by target pairs that had no say.

A candidate ranks the sampled pairs and drops the last ones, and the heads are refitted on the rest. The target has three parts.
In turn, two of them rank the pairs (they are *asked*), and the third one is *held out*. What the refit loses on the asked parts
is optimistic, because these pairs chose what was dropped for them. What it loses on the held-out part is what happens to
everything that a target does not name. A corpus has both kinds of pairs: a share c whose captions the target asks about, and
others. So

    M = OPTIMISM c (loss on the asked parts) + (1 - c) (loss on the held-out part)

Three steps, each of which needs evidence beyond the noise of its estimate:

1. Drop nothing, or the run's own share of misaligned pairs, ranked by misalignment alone.
2. At that share, let influence count too. The held-out part must not lose by it. Of the candidates that gain most of what can
   be gained, the first is taken: they are listed from the mildest to the strongest.
3. Drop more than that share. Heads on frozen trunks hardly miss a good pair, a model that learns its features does: so the gain
   has to exceed what as many random pairs cost.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecif.columns.evidence import Evidence
from ecif.columns.filter import Ranking, ranking
from ecif.columns.misalignment import NONE, Misalignment
from ecif.columns.near import asked_share, nearness
from ecif.directions import Directions
from ecif.heads import Heads
from ecif.heads.cross_fit import Refit, Refitter
from ecif.permutation import permutation
from ecif.sample import Sample
from ecif.targets.question import Question

WEIGHTS = (("residual", 0.3), ("level", 0.25), ("level", 0.75))  # the mildest first
MOST = 0.9  # of the pairs that a candidate may drop
REFERENCES = 2  # candidates that are fitted once more, to know the noise of a refit
OPTIMISM = 0.25  # of a gain on the asked parts, so much counts; another artist's test showed half of it
ERRORS = 2.0  # standard errors that a gain has to exceed
MOST_OF_IT = 0.8  # of the largest gain: milder candidates that reach it are preferred
JUDGED = 512  # pairs of a part that judge a refit, as one batch
GROUPS = 6  # the standard error is that of a jackknife over as many groups of them
COUNTED = 1024  # pairs and distinct captions by which the asked share is found


class Candidate(NamedTuple):
    """A filter to try."""

    influence: (
        str  # how influence counts: "none", "residual" or "level"; "random" drops random pairs beside the misaligned ones
    )
    weight: float  # of influence
    drop: float  # share of the pairs to drop


class HowToFilter(NamedTuple):
    """The candidates, and the number of refits of each."""

    beyond: list[float]  # shares of the pairs, above 0, that candidates drop beside the misaligned ones
    seeds: int  # fits of each candidate whose losses are averaged
    seed: int  # of the first fit; the next fit has the next seed

    def candidates(self, share: float) -> list[Candidate]:
        """To drop nothing, then the misaligned share, then more; at each share the mildest first."""
        found = [Candidate("none", 0.0, 0.0), Candidate("none", 0.0, share)]
        for drop in (min(share + more, MOST) for more in (0.0, *sorted(self.beyond))):
            found += [Candidate(influence, weight, drop) for influence, weight in WEIGHTS]
            found += [Candidate("random", 0.0, drop)] if drop > share else []
        return found

    def fits(self, parts: int) -> int:
        """How many fits the choice takes."""
        return parts * (len(self.candidates(0.0)) * self.seeds + REFERENCES)


class Gain(NamedTuple):
    """How much lower M is than that of another candidate. Above 0 is better."""

    gain: float  # nats a pair
    error: float  # standard error: of the target's pairs and of the refits

    @property
    def sure(self) -> bool:
        """Whether it is beyond its noise."""
        return self.gain > ERRORS * self.error


class Judged(NamedTuple):
    """Losses of all refits, mean over seeds. A jackknife leaves out one group of the target's pairs at a time."""

    asked: Tensor  # [C, 1 + GROUPS] of the asked parts: with all groups, then without each
    held: Tensor  # [C, 1 + GROUPS] of the held-out part
    covered: float  # c, the share of the corpus that the target asks about
    noise: Tensor  # [2] standard deviation of the difference of two refits, on the asked parts and on the held-out one

    def gain(self, of: int, over: int) -> Gain:
        """By how much candidate `of` is better than `over`."""
        asked, held = OPTIMISM * self.covered, 1 - self.covered
        gain = asked * (self.asked[over] - self.asked[of]) + held * (self.held[over] - self.held[of])
        noise = math.hypot(asked * self.noise[0].item(), held * self.noise[1].item())
        return Gain(gain[0].item(), math.hypot(_jackknife(gain[1:]), noise))

    def harm(self, of: int, over: int) -> float:
        """What candidate `of` costs pairs that had no say, in standard errors; below 0 it does not."""
        cost = self.held[of] - self.held[over]
        return cost[0].item() / max(math.hypot(_jackknife(cost[1:]), self.noise[1].item()), 1e-12)

    def price(self, of: int, over: int) -> float:
        """What the pairs that `of` drops and `over` keeps are worth, without a discount for optimism."""
        lost = self.covered * (self.asked[of] - self.asked[over]) + (1 - self.covered) * (self.held[of] - self.held[over])
        return max(0.0, lost[0].item())


class ChosenFilter(NamedTuple):
    """The ranking of pairs for one target, and how it was chosen."""

    ranking: Ranking
    misalignment: Misalignment  # learned from evidence that includes influence on this target only
    facts: dict[str, Any]  # what was chosen and tried, for run.json

    def scores(self, evidence: Tensor, influence: Tensor, near: Tensor) -> Tensor:
        """[N] float32 in 0 to 1: the higher its score, the earlier a pair is kept.

        Args:
            evidence: [N, E] scores of the pairs that count as evidence, without influence.
            influence: [N] influence of the pairs on the target.
            near: [N] nearness of their captions to the target's.
        """
        probability = self.misalignment.probability(torch.cat([evidence, influence[:, None]], 1)).float()
        return self.ranking.scores(probability, influence, near)


def said(facts: dict[str, Any]) -> str:
    """One line for the user: what was chosen, how sure it is, and how much of the corpus the target says nothing about."""
    silent = f"the target says nothing about {1 - facts['asked']:.0%} of the corpus"
    if facts["keep"] == 1:
        return f"keep everything: no candidate gains more than its noise; {silent}"
    how = {
        "none": "by misalignment alone",
        "residual": f"by misalignment, with influence {facts['weight']:g} among pairs as near to the target",
        "level": f"by {1 - facts['weight']:g} misalignment and {facts['weight']:g} influence",
    }[facts["influence"]]
    sure = f"gain {facts['gain']:.3f} ± {facts['error']:.3f} nats by target pairs that had no say, among others"
    return f"keep {facts['keep']:.1%}, {how}; {sure}; {silent}"


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
        how: the candidates and the number of refits.
    """
    captions, texts, centre = question.loss.captions(), sample.texts.float(), evidence.bank.text_centre
    misalignment = evidence.misalignment(directions.influence[None], directions.planted[None])
    share = misalignment.known_share or 0.0
    tried = how.candidates(share)
    count = len(question.parts)

    def masks(held: int) -> list[Tensor]:
        """The pairs that each candidate keeps, if one part of the target has no say."""
        asked = [part for part in range(count) if part != held]
        # Scaled: a part of the target has about that part of its loss.
        influence, planted = (count / len(asked) * of[asked].sum(0) for of in (directions.parts, directions.planted_parts))
        near = nearness(texts, captions[torch.cat([question.rows[part] for part in asked])], centre)
        learned = evidence.misalignment(influence[None], planted[None])
        return _masks(tried, share, learned.probability(evidence.of(influence[None])), influence, near)

    kept = [masks(held) for held in range(count)]
    jobs = [Refit(mask, how.seed + s, new_batches=True) for of in kept for mask in of for s in range(how.seeds)]
    again = [Refit(mask, how.seed + how.seeds, new_batches=True) for of in kept for mask in of[:REFERENCES]]
    losses = torch.stack([_losses(question, path[-1]) for path in refit([*jobs, *again])])
    parts, groups = losses.shape[1:]
    by_seed = losses[: len(jobs)].view(count, len(tried), how.seeds, parts, groups)
    asked, held = _of_parts(by_seed.mean(2))
    other = _of_parts(losses[len(jobs) :].view(count, REFERENCES, parts, groups))
    first = _of_parts(by_seed[:, :REFERENCES, 0])
    noise = torch.stack([(b[:, 0] - a[:, 0]).square().mean().sqrt() for a, b in zip(first, other, strict=True)])
    rows = permutation(len(texts), "asked share", how.seed)[:COUNTED]
    among = texts.unique(dim=0)
    covered = asked_share(texts[rows], captions, centre, among)
    judged = Judged(asked, held, covered, noise / math.sqrt(how.seeds))
    chosen = choose_candidate(tried, judged, share)
    near = nearness(texts, captions, centre)
    probability = misalignment.probability(evidence.of(directions.influence[None]))
    facts = _facts(tried, judged, chosen)
    one = tried[chosen]
    order = ranking(probability, directions.influence, near, one.weight, one.influence == "level")
    return ChosenFilter(order, misalignment, facts)


def choose_candidate(tried: list[Candidate], judged: Judged, share: float) -> int:
    """The position of the chosen candidate.

    Args:
        tried: the candidates, as `HowToFilter.candidates` lists them.
        judged: their losses.
        share: the run's own share of misaligned pairs; 0 if it is none or unknown.
    """
    base = 1 if share >= NONE and judged.gain(1, 0).sure else 0
    counted = [i for i, one in enumerate(tried) if one.weight]
    best = _mildest([i for i in counted if base and tried[i].drop == share], base, judged)
    prices = {one.drop: judged.price(i, base) for i, one in enumerate(tried) if one.influence == "random"}
    further = [i for i in counted if tried[i].drop > share and judged.gain(i, best).gain > prices[tried[i].drop]]
    return _mildest(further, best, judged)


def _mildest(candidates: list[int], base: int, judged: Judged) -> int:
    """The first of the candidates that gain most, among those that gain for sure and harm nothing; `base` if there is none."""
    allowed = [i for i in candidates if judged.gain(i, base).sure and judged.harm(i, base) <= 0]
    if not allowed:
        return base
    most = max(judged.gain(i, base).gain for i in allowed)
    return next(i for i in allowed if judged.gain(i, base).gain >= MOST_OF_IT * most)


def _masks(tried: list[Candidate], share: float, probability: Tensor, influence: Tensor, near: Tensor) -> list[Tensor]:
    """For each candidate, [N] bool: the pairs that it keeps."""
    aligned = ranking(probability, influence, near, 0.0).keep(probability, influence, near, 1 - share)
    masks = []
    for one in tried:
        if one.influence == "random":
            rows = aligned.nonzero()[:, 0]
            mask = torch.zeros_like(aligned)
            mask[rows[permutation(len(rows), "random filter", one.drop)[: round((1 - one.drop) * len(mask))]]] = True
        else:
            how = ranking(probability, influence, near, one.weight, one.influence == "level")
            mask = how.keep(probability, influence, near, 1 - one.drop)
        masks.append(mask)
    return masks


def _losses(question: Question, heads: Heads) -> Tensor:
    """[PARTS, 1 + GROUPS] mean loss of each part, with all its pairs and without each group; float64."""
    table = []
    for rows in question.rows:
        rows = rows[:JUDGED]
        groups = rows.tensor_split(GROUPS) if len(rows) >= 2 * GROUPS else [rows[:0]] * GROUPS
        without = [torch.cat([*groups[:g], *groups[g + 1 :]]) if len(groups[g]) else rows for g in range(GROUPS)]
        table.append([question.mean_loss(heads, some) for some in [rows, *without]])
    return torch.tensor(table, dtype=torch.float64)


def _of_parts(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [held, C, PARTS, G] as those of the asked parts and of the held-out one, each [C, G], mean over held."""
    count = len(losses)
    held = torch.stack([losses[part, :, part] for part in range(count)])
    asked = (losses.sum(2) - held) / max(1, count - 1)
    return asked.mean(0), held.mean(0)


def _jackknife(without: Tensor) -> float:
    """Standard error of an estimate from its values [G] without each group."""
    return ((len(without) - 1) * (without - without.mean()).square().mean()).sqrt().item()


def _facts(tried: list[Candidate], judged: Judged, chosen: int) -> dict[str, Any]:
    gain = judged.gain(chosen, 0)
    table = [
        one._asdict() | {"asked_loss": a[0].item(), "held_loss": h[0].item()}
        for one, a, h in zip(tried, judged.asked, judged.held, strict=True)
    ]
    return tried[chosen]._asdict() | {
        "keep": 1 - tried[chosen].drop,
        "gain": gain.gain,
        "error": gain.error,
        "asked": judged.covered,
        "tried": table,
    }
