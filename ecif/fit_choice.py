"""Choose how the heads are fitted, by pairs that the fits have not seen.

What is right for heads that start at random ruins the heads of a pre-trained model: at logit scale 100 they memorise the wrong
captions within a few epochs. So a run tries a small grid of learning rates, lengths and pulls towards the start. It fits each
candidate without a fold, or without several in turn where the sample is small, and judges it on the pairs of that fold:

- by `ecif.matching`, which wrong pairs do not rule. The candidate with the smallest loss is taken;
- by the plain mean of the training loss. A candidate that raises it above that of the start is out.

If every fit is worse than the start by more than TIE, the heads stay what they are. A fit that is as good is preferred, because
refits without some pairs then have something to say. The strongest pull is nearly the start.

The pull adds strength / 2 |W - W_start|^2 to the loss of every step. Cosine heads have no minimum under weight decay towards 0.
With a pull towards the start they have one near it, the same at any learning rate, and influence is about a minimum. The
damping of `solve` stands in for the pull's own curvature: both are in the same unit, and refits choose it.

Larger learning rates are left out on purpose. On the demo, 3e-3 matches held-out pairs better than 1e-3, but influence predicts
its refits worse (LDS 0.80 instead of 0.92): the heads are further from a minimum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecif.batching import cut
from ecif.heads import Heads, embed, logits
from ecif.heads.cross_fit import NO_FIT, HowToFit, Hyperparameters, Job, Refit
from ecif.heads.curvature import gauss_newton_product
from ecif.heads.fit import with_best_bias
from ecif.matching import matching
from ecif.permutation import permutation
from ecif.sample import Sample, consecutive
from ecif.solve import largest_eigenvalue

LEARNING_RATES = (3e-4, 1e-3)
EPOCHS = (2, 8)
PULLS = (0.0, 0.1, 1.0, 10.0)  # in units of the largest eigenvalue of the curvature at the start, as dampings are
TIE = 1e-3  # nats a pair by which matching losses may differ and count as equal; other held-out pairs would change as much
ENOUGH = 1024  # folds are held out in turn until so many pairs are judged
MOST = 2048  # of a fold, so many pairs are judged, in batches of at most as many; the curvature is that of so many pairs
UNTRAINED = 0.98  # heads whose matching loss is above this share of chance tell nothing


@dataclass(frozen=True)
class Grid:
    """The candidates: every combination."""

    learning_rates: Sequence[float] = LEARNING_RATES
    epochs: Sequence[int] = EPOCHS
    pulls: Sequence[float] = PULLS
    fixed: bool = False  # everything was said by the user: there is one candidate, and it is taken whatever it loses

    @classmethod
    def of(cls, learning_rate: float | None, epochs: int | None, pull: float | None, checkpoints: int) -> "Grid":
        """The grid around what a user said; None leaves a value to the choice. A fit has an epoch for each checkpoint."""
        lengths = [length for length in EPOCHS if length >= checkpoints] or [checkpoints]
        return cls(
            LEARNING_RATES if learning_rate is None else [learning_rate],
            lengths if epochs is None else [epochs],
            PULLS if pull is None else [pull],
            fixed=None not in (learning_rate, epochs, pull),
        )

    def candidates(self) -> list["Candidate"]:
        """The combinations, the gentlest first."""
        return [Candidate(*of) for of in product(self.learning_rates, self.epochs, sorted(self.pulls, reverse=True))]


class Candidate(NamedTuple):
    """One way to fit."""

    learning_rate: float
    epochs: int
    pull: float  # in units of the largest eigenvalue at the start


class HeldOut(NamedTuple):
    """What a candidate loses on pairs that it was not fitted on."""

    held_out_loss: float  # mean training loss, nats a pair, in the convention of open_clip's ClipLoss
    matching_loss: float  # see `ecif.matching`; wrong pairs do not rule it
    wrong: float  # share of wrong pairs, as the matching loss estimates it
    chance: float  # the matching loss of heads that know nothing
    pairs: int  # how many were judged

    def told(self) -> dict[str, float]:
        """For run.json."""
        return {"held_out_loss": self.held_out_loss, "matching_loss": self.matching_loss, "wrong": self.wrong}

    def no_worse(self, start: "HeldOut") -> bool:
        """Whether these heads match held-out pairs as well as the start, and have no larger training loss on them."""
        return self.held_out_loss <= start.held_out_loss and self.matching_loss <= start.matching_loss + TIE


class FitChoice(NamedTuple):
    """How the heads of a run are fitted."""

    hyperparameters: Hyperparameters
    facts: dict[str, Any]  # what was tried and what it lost, for run.json

    def line(self) -> str:
        """One line for the user."""
        before, after = self.facts["start"], self.facts["chosen"]
        moved = (
            f"held-out loss {before['held_out_loss']:.3g} before, {after['held_out_loss']:.3g} after "
            f"(matching loss {before['matching_loss']:.4g}, {after['matching_loss']:.4g})"
        )
        if not self.hyperparameters.epochs:
            return f"{moved}: no fit improves on the checkpoint's heads, so they stay as they are"
        how = f"learning rate {after['learning_rate']:g}, {after['epochs']} epochs, pull {after['pull']:g}"
        return f"{moved}; {how}"

    def warnings(self) -> list[str]:
        """Lines about what a user should know or mend."""
        before, after = self.facts["start"], self.facts["chosen"]
        found = []
        if self.facts["untrained"]:
            found.append(
                "the checkpoint's projections match held-out images and captions hardly better than chance: they look "
                "untrained, and clip_score says nothing; use held_out_cosine, or another checkpoint"
            )
        if self.facts["worse"]:
            found.append(
                f"the fit matches held-out pairs worse than the checkpoint (loss {before['held_out_loss']:.3g} before, "
                f"{after['held_out_loss']:.3g} after; matching loss {before['matching_loss']:.4g}, "
                f"{after['matching_loss']:.4g}): "
                "leave out fit.learning_rate, fit.epochs and fit.pull to have them chosen"
            )
        if not self.hyperparameters.epochs:
            found.append(
                "influence is taken at the checkpoint's heads, which this corpus was not fitted to, and can't be calibrated by "
                "refits: give a larger corpus or fit.sample, or say fit.learning_rate, fit.epochs and fit.pull"
            )
        return found


Fits = Callable[[list[Job]], list[list[Heads]]]  # runs fits, and returns each one's checkpoints


def choose_fit(how: HowToFit, sample: Sample, grid: Grid, run: Fits, seed: int) -> FitChoice:
    """Choose learning rate, length and pull.

    Args:
        how: start, loss and batch size of every fit; its hyperparameters are not read.
        sample: the pairs.
        grid: the candidates.
        run: runs fits on parts of the sample.
        seed: of the order of the fits' batches, and of the batches that held-out pairs are judged in.

    Raises:
        ValueError: no fold has two pairs.
    """
    unit = largest_curvature(how, sample)
    candidates = grid.candidates()
    settings = [Hyperparameters(c.learning_rate, c.epochs, c.pull * unit) for c in candidates]
    folds = _held_out_folds(sample.fold)
    if not folds:
        raise ValueError(f"{len(sample.fold)} pairs are too few for the folds: no fold has two pairs")
    ends = iter([path[-1] for path in run([(setting, Refit(sample.fold != f, seed)) for setting in settings for f in folds])])
    start = judge(how, sample, {f: how.start for f in folds}, seed)
    held = [judge(how, sample, {f: next(ends) for f in folds}, seed) for _ in candidates]
    chosen = 0 if grid.fixed else _best(start, held)
    tried = [c._asdict() | loss.told() for c, loss in zip(candidates, held, strict=True)]
    facts = {
        "start": start.told(),
        "chosen": Candidate(0.0, 0, 0.0)._asdict() | start.told() if chosen is None else tried[chosen],
        "tried": tried,
        "held_out_pairs": start.pairs,
        "worse": chosen is not None and not held[chosen].no_worse(start),
        "untrained": start.matching_loss > UNTRAINED * start.chance,
    }
    return FitChoice(NO_FIT if chosen is None else settings[chosen], facts)


def judge(how: HowToFit, sample: Sample, heads: dict[int, Heads], seed: int) -> HeldOut:
    """Judge heads on the pairs of the folds that they were fitted without.

    Args:
        how: loss and batch size.
        sample: the pairs.
        heads: for each judged fold, heads that were fitted without it.
        seed: of the batches.
    """
    similarities = []
    for f, of_fold in heads.items():
        mine = (sample.fold == f).nonzero()[:, 0]
        batches = cut(mine[permutation(len(mine), "held out", seed, f)], min(how.batch_size, MOST))
        pairs = [embed(of_fold, *sample.features(rows, rows, of_fold.image.device)) for rows in batches[: _enough(batches)]]
        best = with_best_bias(of_fold, pairs, how.loss)
        similarities += [logits(best, batch) for batch in pairs]
    count = sum(map(len, similarities))
    loss = sum(how.loss.batch_loss(s).double().item() for s in similarities) / (2 * count)
    found = matching(similarities)
    return HeldOut(loss, found.loss, found.wrong, found.chance, count)


def largest_curvature(how: HowToFit, sample: Sample) -> float:
    """Largest eigenvalue of the curvature of a step's mean loss, at the start, over the first batches of the sample."""
    to, batches = how.start.image.device, sample.batches()
    batches = batches[: _enough(batches)]
    rows = torch.cat(batches)
    pairs, places = embed(how.start, *sample.features(rows, rows, to)), [at.to(to) for at in consecutive(batches)]
    random = torch.randn(1, how.start.size, generator=torch.Generator().manual_seed(0)).to(to)
    heads = with_best_bias(how.start, [pairs.take(at) for at in places], how.loss)
    top = largest_eigenvalue(lambda v: gauss_newton_product(heads, pairs, places, v, how.loss), random).item()
    return top / (2 * how.batch_size * len(batches))


def _best(start: HeldOut, held: list[HeldOut]) -> int | None:
    """The candidate with the smallest matching loss, among those that do not raise the held-out loss; None for the start."""
    better = [(loss.matching_loss, i) for i, loss in enumerate(held) if loss.no_worse(start)]
    return min(better)[1] if better else None


def _held_out_folds(fold: Tensor) -> list[int]:
    """The folds that are held out in turn: the first ones, until ENOUGH pairs are judged."""
    folds, pairs = list[int](), 0
    for f in fold.unique().tolist():
        if pairs < ENOUGH and (fold == f).sum() > 1:
            folds.append(f)
            pairs += int((fold == f).sum())
    return folds


def _enough(batches: list[Tensor]) -> int:
    """How many of the first batches have MOST pairs or more."""
    return int((torch.tensor([len(rows) for rows in batches]).cumsum(0) < MOST).sum()) + 1
