"""Stage `solve`: the shared inverse-Hessian system, q = (H + damping I)^-1 grad L_T for every target and set of heads.

Actors hold slices of the sampled features and return Gauss-Newton products; the reducer sums them in fixed order and takes the
conjugate gradient steps of all systems together. The damping is the one whose predictions agree best with real refits.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.evaluation import linear_datamodeling_score
from ecif.heads import Heads
from ecif.solve import KrylovSpaces
from pipeline import heads as stored
from pipeline.cluster import Resources
from pipeline.config import Config
from pipeline.fit import FittedHeads, Refit, refit_all
from pipeline.progress import Stage
from pipeline.sample import Sample
from pipeline.shards import permutation
from pipeline.slices import SampleActors, System
from pipeline.targets import Target, coverage, gradient, group_losses, groups

REMOVED = 0.3  # share of the sample that a calibration refit goes without
QUANTILES = 1025


class Directions(NamedTuple):
    """What `score` needs to answer for every pair."""

    folds: Tensor  # [K, seeds x checkpoints, T, P]
    held_out_loss: Tensor  # [QUANTILES] of the sample, out of sample
    influence: Tensor  # [T, QUANTILES] of the sample, out of sample
    calibration: Tensor  # [G, N] influence of the sample on every calibration group under the full heads, targets in turn
    facts: dict[str, Any]  # damping and the agreement with refits that it reached, per target


def read_directions(url: str) -> Directions:
    """Directions that an earlier call wrote; FileNotFoundError if there are none."""
    tensors, facts = stored.read(url)
    return Directions(**tensors, facts=facts)


def solve(
    url: str, start: Heads, fitted: FittedHeads, sample: Sample, targets: list[Target], config: Config, resources: Resources
) -> Directions:
    """Solve for every target, or read the directions if they are there."""
    try:
        return read_directions(url)
    except FileNotFoundError:
        pass
    with Stage("solve", config.solve.iterations + _refits(config)) as progress:
        removed, refitted = _refit(start, sample, config, resources, progress)  # before the actors: they take the CPUs
        every_head = [*fitted.path, *(h for fold in fitted.folds for h in fold)]
        pool = SampleActors(every_head, sample, config, resources)
        calibration, crossed = _systems(fitted, targets, config)
        gradients = [g for g, _ in calibration + crossed]
        spaces = pool.krylov([s for _, s in calibration + crossed], torch.stack(gradients), config, progress)
        ours, theirs = _cut(spaces, 0, len(calibration)), _cut(spaces, len(calibration), len(gradients))
        calibrated, facts = _calibrate(pool, ours, removed, refitted, targets, config)
        relative = torch.tensor([facts[t.name]["damping"] for t in targets], dtype=torch.float64)
        shape = (config.fit.folds, config.fit.fits, len(targets))
        directions, residual = theirs.solve(relative.repeat(shape[0] * shape[1]) * theirs.largest_eigenvalue())
        for i, target in enumerate(targets):
            facts[target.name]["residual"] = residual[i :: len(targets)].max().item()
            facts[target.name]["coverage"] = coverage(fitted.full, target, sample, config)
        folds = directions.view(*shape, -1)
        held_out_loss, influence = pool.out_of_sample(folds)
        grid = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
        tensors = {
            "folds": folds,
            "held_out_loss": held_out_loss.double().quantile(grid),
            "influence": influence.double().quantile(grid, dim=1).T.contiguous(),
            "calibration": calibrated,
        }
        stored.write(url, tensors, **facts)
    return Directions(**tensors, facts=facts)


def _systems(
    fitted: FittedHeads, targets: list[Target], config: Config
) -> tuple[list[tuple[Tensor, System]], list[tuple[Tensor, System]]]:
    """Right-hand sides: parts of every target under the full heads, and whole targets under each fold's heads."""
    calibration, crossed = [], []
    for c, heads in enumerate(fitted.path):
        for target in targets:
            for group in groups(target, config):
                calibration.append((gradient(heads, target, group, config), System(c, -1)))
    for f, fits in enumerate(fitted.folds):
        for s, heads in enumerate(fits):
            for target in targets:
                system = System(len(fitted.path) + f * len(fits) + s, f)
                crossed.append((gradient(heads, target, target.batches(config), config), system))
    return calibration, crossed


def removals(pairs: int, count: int, config: Config, purpose: str) -> NDArray[np.bool_]:
    """[count, pairs]: random subsets that refits go without."""
    removed = np.zeros((count, pairs), bool)
    for r in range(count):
        removed[r, permutation(pairs, purpose, config.seed, r)[: int(REMOVED * pairs)]] = True
    return removed


def _refits(config: Config) -> int:
    """How many refits the choice of the damping takes: none where there is nothing to choose."""
    return config.solve.refits if len(config.solve.dampings) > 1 else 0


def _refit(start: Heads, sample: Sample, config: Config, resources: Resources, progress: Stage) -> tuple[Tensor, list[Heads]]:
    """The truth to calibrate against: [R, N] what each refit goes without, and its heads."""
    removed = removals(len(sample.fold), _refits(config), config, "calibrate")
    return torch.from_numpy(removed), refit_all(
        start, sample, [Refit(~r, config.seed) for r in removed], config, resources, progress
    )


def _calibrate(
    pool: SampleActors, spaces: KrylovSpaces, removed: Tensor, refitted: list[Heads], targets: list[Target], config: Config
) -> tuple[Tensor, dict[str, Any]]:
    """Per target: the damping whose predicted losses of the refits rank best, and how well (LDS).

    Returns:
        [G, N] influence on every calibration group at the damping chosen for its target, and the facts.
    """
    candidates = config.solve.dampings
    parts = len(spaces.norm) // config.fit.checkpoints
    influence = torch.zeros(len(candidates), parts, removed.shape[1])
    for c in range(config.fit.checkpoints):
        own = _cut(spaces, c * parts, (c + 1) * parts)
        top = own.largest_eigenvalue().max()
        solved = [own.solve(torch.full_like(own.norm, d) * top)[0] for d in candidates]
        influence += pool.influence(System(c, -1), torch.cat(solved)).view(influence.shape) / config.fit.checkpoints
    chosen: list[Tensor] = []
    facts: dict[str, Any] = {}
    for target in targets:
        of_target = influence[:, sum(map(len, chosen)) :][:, : len(groups(target, config))]
        best, lds = 0, list[float]()
        if refitted:
            losses = torch.stack([group_losses(heads, target, config) for heads in refitted])
            lds = [linear_datamodeling_score(scores, removed, losses) for scores in of_target]
            best = max(range(len(lds)), key=lambda i: lds[i] if math.isfinite(lds[i]) else -math.inf)
        agreement = {"lds": lds[best] if lds else None, "refits": len(refitted), "lds_of_dampings": lds}
        facts[target.name] = {"damping": candidates[best], **agreement}
        chosen.append(of_target[best])
    return torch.cat(chosen), facts


def _cut(spaces: KrylovSpaces, first: int, last: int) -> KrylovSpaces:
    return KrylovSpaces(*(part[first:last] for part in spaces))
