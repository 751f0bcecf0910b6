"""Stage `solve`: the shared inverse-Hessian system, q = (H + damping I)^-1 grad L_T for every target and set of heads.

Actors hold slices of the sampled features and return Gauss-Newton products; the reducer sums them in fixed order and takes the
conjugate gradient steps of all systems together. The damping is the one whose predictions agree best with real refits.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.damping import choose_damping
from ecif.heads import Heads
from ecif.misalignment import Misalignment, evidence, learn
from ecif.solve import KrylovSpaces
from pipeline import heads as stored
from pipeline.cluster import Resources
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.fit import FittedHeads, Refit, refit_all
from pipeline.progress import Stage
from pipeline.sample import Sample
from pipeline.shards import permutation
from pipeline.slices import OutOfSample, SampleActors, System
from pipeline.targets import Target, coverage, gradient, group_losses, groups

REMOVED = 0.3  # share of the sample that a calibration refit goes without


class Directions(NamedTuple):
    """What `score` needs to answer for every pair."""

    folds: Tensor  # [K, seeds x checkpoints, T, P]
    misalignment: Misalignment  # from evidence to a probability
    sample: OutOfSample  # the sample's scores, influence [T, 2, N]: on each half of the target by itself
    calibration: Tensor  # [G, N] influence of the sample on every calibration group under the full heads, targets in turn
    facts: dict[str, Any]  # damping and the agreement with refits that it reached, per target


def read_directions(url: str) -> Directions:
    """Directions that an earlier call wrote; FileNotFoundError if there are none."""
    tensors, facts = stored.read(url)
    misalignment = Misalignment(*(tensors[f"misalignment.{field}"] for field in Misalignment._fields))
    sample = OutOfSample(*(tensors[f"sample.{field}"] for field in OutOfSample._fields))
    return Directions(tensors["folds"], misalignment, sample, tensors["calibration"], facts)


def _write(url: str, directions: Directions) -> None:
    tensors = {"folds": directions.folds, "calibration": directions.calibration}
    for name in ("misalignment", "sample"):
        tensors |= {f"{name}.{field}": tensor for field, tensor in getattr(directions, name)._asdict().items()}
    stored.write(url, tensors, **directions.facts)


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
        with SampleActors(every_head, sample, config, resources) as pool:
            directions = _answer(pool, fitted, sample, targets, removed, refitted, config, progress)
        _write(url, directions)
    return directions


def _answer(
    pool: SampleActors,
    fitted: FittedHeads,
    sample: Sample,
    targets: list[Target],
    removed: Tensor,
    refitted: list[Heads],
    config: Config,
    progress: Stage,
) -> Directions:
    """The systems solved, the damping chosen by the refits, and what the sample's own scores say of misalignment."""
    calibration, crossed = _systems(fitted, targets, config)
    gradients = [g for g, _ in calibration + crossed]
    spaces = pool.krylov([s for _, s in calibration + crossed], torch.stack(gradients), config, progress)
    ours, theirs = _cut(spaces, 0, len(calibration)), _cut(spaces, len(calibration), len(gradients))
    calibrated, facts = _calibrate(pool, ours, removed, refitted, targets, config)
    relative = torch.tensor([[facts[t.name]["damping"]] * 2 for t in targets], dtype=torch.float64).flatten()
    fits = (config.fit.folds, config.fit.fits)
    answers, residual = theirs.solve(relative.repeat(fits[0] * fits[1]) * theirs.largest_eigenvalue())
    for target, left in zip(targets, residual.view(-1, len(targets), 2).amax((0, 2)), strict=True):
        facts[target.name]["residual"] = left.item()
        facts[target.name]["coverage"] = coverage(fitted.full, target, sample, config)
    folds = answers.view(*fits, len(targets), 2, -1).sum(3)
    scores, planted = pool.out_of_sample(answers.view(*fits, 2 * len(targets), -1)), pool.out_of_sample(folds, plant=True)
    scores = scores._replace(influence=scores.influence.unflatten(0, (len(targets), 2)))
    misalignment = _misalignment(scores, planted, sample)
    for of_target in facts.values():
        of_target["misaligned"] = misalignment.share.item()
    return Directions(folds, misalignment, scores, calibrated, facts)


def _misalignment(real: OutOfSample, planted: OutOfSample, sample: Sample) -> Misalignment:
    """Learned from the sample and from its copy with planted swaps; a swap of two equal captions is none."""
    swapped = torch.from_numpy((sample.texts != sample.texts[sample.partners()]).any(1))
    if not swapped.any():
        raise RunError("all captions of the sampled pairs are alike: nothing tells which belong to their images")
    whole = evidence(real.held_out_loss, real.clip_score, real.influence.sum(1))
    return learn(whole, evidence(*planted)[swapped])


def _systems(
    fitted: FittedHeads, targets: list[Target], config: Config
) -> tuple[list[tuple[Tensor, System]], list[tuple[Tensor, System]]]:
    """Right-hand sides: parts of every target under the full heads, and both halves of targets under each fold's heads."""
    calibration, crossed = [], []
    for c, heads in enumerate(fitted.path):
        for target in targets:
            for group in groups(target, config):
                calibration.append((gradient(heads, target, group, config), System(c, -1)))
    for f, fits in enumerate(fitted.folds):
        for s, heads in enumerate(fits):
            system = System(len(fitted.path) + f * len(fits) + s, f)
            for target in targets:
                crossed += [(gradient(heads, target, half, config), system) for half in target.halves(config)]
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
            best, lds = choose_damping(of_target, removed, losses)
        agreement = {"lds": lds[best] if lds else None, "refits": len(refitted), "lds_of_dampings": lds}
        facts[target.name] = {"damping": candidates[best], **agreement}
        chosen.append(of_target[best])
    return torch.cat(chosen), facts


def _cut(spaces: KrylovSpaces, first: int, last: int) -> KrylovSpaces:
    return KrylovSpaces(*(part[first:last] for part in spaces))
