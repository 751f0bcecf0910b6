"""Solve for a target's directions q = (H + damping I)^-1 grad L_T, and compute the influence of the sampled pairs with them.

Heads are refitted without random pairs. The damping is the one whose predictions agree best with these refits. It is chosen
with the heads that were fitted on all of the sample. Pairs are scored with cross-fitted directions: each pair with those of the
heads that were fitted without its fold.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.columns.bank import Bank, build_bank
from ecif.damping import choose_damping
from ecif.heads import Heads
from ecif.heads.cross_fit import FittedHeads
from ecif.permutation import permutation
from ecif.slices import LinearSystem
from ecif.system import SampleSystem
from ecif.targets.question import PARTS, Question, coverage_of

BANK = 4096  # the most pairs of a target that pairs are compared with


class Refitted(NamedTuple):
    """Real refits without random pairs: the truth that dampings are compared with."""

    removed: Tensor  # [R, N] bool, the pairs that each refit left out
    heads: list[Heads]  # [R] the refitted heads; empty if there is only one damping to choose from


class Calibration(NamedTuple):
    """The chosen damping, and how well its predictions agree with refits."""

    damping: float  # in units of the curvature's largest eigenvalue
    lds: float | None  # linear datamodeling score of the chosen damping; None without refits that differ
    refits: int  # number of refits compared with
    lds_of_dampings: list[float]  # of every candidate, in the order of `HowToSolve.dampings`; empty without refits
    residuals: list[float]  # the largest relative residual at every candidate, see `ecif.damping.SOLVED`


class Directions(NamedTuple):
    """The solved directions of one target, and the influence of the sampled pairs on it."""

    folds: Tensor  # [K, fits, P] directions for the heads of each fold
    parts: Tensor  # [PARTS, N] cross-fitted influence of the sampled pairs on each part of the target
    planted_parts: Tensor  # [PARTS, N] the same, each pair with the caption of its partner
    groups: Tensor  # [G, N] influence on every calibration group under the heads fitted on all of the sample
    calibration: Calibration
    residual: float  # the largest relative residual of the systems
    captions: Tensor  # [M, d_t] distinct captions of the target: what it asks about
    bank: Bank  # pairs of the target; the fold of each is its part
    agreement: Tensor  # [1 + PARTS, N] of the sampled pairs with the bank: with all of it, then without each part
    planted_agreement: Tensor  # [1 + PARTS, N] the same, each pair with the caption of its partner
    coverage: float  # share of the sample's captions that the target covers, 0 to 1, see `ecif.targets.coverage`

    @property
    def influence(self) -> Tensor:
        """[N] influence of the sampled pairs on the whole target."""
        return self.parts.sum(0)

    def scores(self, without: int = -1) -> Tensor:
        """[2, N] of the sampled pairs: influence on the target, and agreement with it.

        Args:
            without: the part of the target that has no say; -1 asks all. The influence is scaled to that of a whole target.
        """
        return _scores(self.parts, self.agreement, without)

    def planted_scores(self, without: int = -1) -> Tensor:
        """[2, N] the same, each pair with the caption of its partner."""
        return _scores(self.planted_parts, self.planted_agreement, without)


class HowToSolve(NamedTuple):
    """Settings of the solver."""

    iterations: int  # Lanczos steps; each is one Gauss-Newton product over the sample
    dampings: list[float]  # candidates, in units of the curvature's largest eigenvalue
    seed: int  # of the captions that coverage is measured on


def solve_question(
    system: SampleSystem, fitted: FittedHeads, question: Question, refitted: Refitted, how: HowToSolve
) -> Directions:
    """Choose the damping of one target, and solve for its directions.

    Args:
        system: the sample; its slices hold the heads of `fitted.every()`.
        fitted: heads fitted on all of the sample, and heads fitted without each fold.
        question: the target.
        refitted: refits without random pairs, which the predictions of every damping are compared with.
        how: candidate dampings and number of Lanczos steps.
    """
    groups, calibration = _calibrate(system, fitted, question, refitted, how)
    answers, residual = _cross_fitted(system, fitted, question, calibration.damping, how)
    bank, without = _bank(question, fitted.full, how.seed), list(range(-1, PARTS))
    return Directions(
        answers.sum(2),
        system.held_out_influence(answers),
        system.held_out_influence(answers, plant=True),
        groups,
        calibration,
        residual,
        question.loss.captions().half().unique(dim=0),
        bank,
        system.agreement(bank, without),
        system.agreement(bank, without, plant=True),
        coverage_of(question, fitted.full, system.sample.texts, how.seed),
    )


def _scores(parts: Tensor, agreement: Tensor, without: int) -> Tensor:
    asked = [part for part in range(len(parts)) if part != without]
    return torch.stack([len(parts) / len(asked) * parts[asked].sum(0), agreement[1 + without]])


def _gradient(question: Question, at: tuple[Heads, list[Tensor]]) -> Tensor:
    """Gradient [P] of the target's loss at some heads, on some batches."""
    return question.gradient(*at)


def _bank(question: Question, heads: Heads, seed: int) -> Bank:
    """A bank of the target's pairs, or of BANK random ones if there are more."""
    rows = torch.cat(question.rows)
    part = torch.cat([torch.full_like(of_part, part) for part, of_part in enumerate(question.rows)])
    chosen = permutation(len(rows), "target bank", question.name, seed)[:BANK].sort().values
    images, texts = (of[rows[chosen]].float() for of in (question.loss.images, question.loss.captions()))
    return build_bank(images, texts, part[chosen], heads)


def _calibrate(
    system: SampleSystem, fitted: FittedHeads, question: Question, refitted: Refitted, how: HowToSolve
) -> tuple[Tensor, Calibration]:
    """Influence [G, N] on the target's calibration groups at the best damping, and that damping.

    The best damping is the one, among those that are solved, whose predicted losses rank the refits best. The first one is
    taken if there are no refits.
    """
    groups, checkpoints = question.groups, len(fitted.path)
    gradients = system.spread(partial(_gradient, question), [(heads, group) for heads in fitted.path for group in groups])
    systems = [LinearSystem(c, -1) for c in range(checkpoints) for _ in groups]
    spaces = system.krylov(systems, torch.stack(gradients), how.iterations)
    top = spaces.largest_eigenvalue().view(checkpoints, -1).amax(1).repeat_interleave(len(groups))
    solved = [spaces.solve(damping * top) for damping in how.dampings]
    residuals = torch.stack([residual.max() for _, residual in solved])
    influence = torch.zeros(len(how.dampings), len(groups), system.pairs)
    for c in range(checkpoints):
        mine = torch.cat([q[c * len(groups) : (c + 1) * len(groups)] for q, _ in solved])
        influence += system.influence(c, mine).view(influence.shape) / checkpoints
    best, lds = 0, list[float]()
    if refitted.heads:
        losses = torch.stack(system.spread(question.group_losses, refitted.heads))
        best, lds = choose_damping(influence, refitted.removed, losses, how.dampings, residuals.tolist())
    reached = lds[best] if lds and math.isfinite(lds[best]) else None
    return influence[best], Calibration(how.dampings[best], reached, len(refitted.heads), lds, residuals.tolist())


def _cross_fitted(
    system: SampleSystem, fitted: FittedHeads, question: Question, damping: float, how: HowToSolve
) -> tuple[Tensor, float]:
    """Solve for the direction of each part of a target at the heads of each fold. H leaves out the pairs of that fold.

    The parts are solved one after the other: their Krylov spaces are the largest tensors here.

    Returns:
        [K, fits, PARTS, P] directions, and the largest relative residual.
    """
    every = [(f, s, heads) for f, fits in enumerate(fitted.folds) for s, heads in enumerate(fits)]
    systems = [LinearSystem(len(fitted.path) + f * len(fitted.folds[0]) + s, f) for f, s, _ in every]
    answers, largest = [], 0.0
    for part in question.parts:
        gradients = torch.stack(system.spread(partial(_gradient, question), [(heads, part) for _, _, heads in every]))
        spaces = system.krylov(systems, gradients, how.iterations)
        found, residual = spaces.solve(damping * spaces.largest_eigenvalue())
        answers.append(found.view(len(fitted.folds), len(fitted.folds[0]), -1))
        largest = max(largest, residual.max().item())
    return torch.stack(answers, 2), largest
