"""Stage `solve`: the shared inverse-Hessian system, q = (H + damping I)^-1 grad L_T for every target and set of heads.

Actors hold slices of the sampled features and return Gauss-Newton products; the reducer sums them in fixed order and takes the
conjugate gradient steps of a target's systems together. The damping is the one whose predictions agree best with real refits.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.columns.bank import Bank, build
from ecif.columns.misalignment import Misalignment, evidence, learn
from ecif.damping import choose_damping
from ecif.heads import Heads
from ecif.solve import KrylovSpaces
from pipeline.config import Config
from pipeline.corpus.batches import permutation
from pipeline.errors import RunError
from pipeline.run_folder import tensors as stored
from pipeline.stages.fit.sample import Sample
from pipeline.stages.fit.stage import FittedHeads, Refit, as_features, refit_all
from pipeline.stages.solve.slices import OutOfSample, SampleActors, System
from pipeline.stages.solve.targets import Target, coverage, gradient, group_losses, groups
from pipeline.workers.cluster import Resources
from pipeline.workers.progress import Stage

REMOVED = 0.3  # share of the sample that a calibration refit goes without
BANK = 16_384  # pairs that every pair's neighbours are looked for among


class Directions(NamedTuple):
    """What `score` needs to answer for every pair."""

    folds: Tensor  # [K, seeds x checkpoints, T, P]
    misalignment: Misalignment  # from evidence to a probability
    bank: Bank  # of the sample's pairs, for the agreement
    sample: OutOfSample  # the sample's scores, influence [T, 2, N]: on each half of the target by itself
    calibration: Tensor  # [G, N] influence of the sample on every calibration group under the full heads, targets in turn
    facts: dict[str, Any]  # damping and the agreement with refits that it reached, per target


def read_directions(url: str) -> Directions:
    """Directions that an earlier call wrote; FileNotFoundError if there are none."""
    tensors, facts = stored.read(url)
    misalignment = Misalignment(*(tensors[f"misalignment.{field}"] for field in Misalignment._fields))
    bank = Bank(*(tensors[f"bank.{field}"] for field in Bank._fields))
    sample = OutOfSample(*(tensors[f"sample.{field}"] for field in OutOfSample._fields))
    return Directions(tensors["folds"], misalignment, bank, sample, tensors["calibration"], facts)


def _write(url: str, directions: Directions) -> None:
    tensors = {"folds": directions.folds, "calibration": directions.calibration}
    for name in ("misalignment", "bank", "sample"):
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
    with Stage("solve", 2 * len(targets) * config.solve.iterations + _refits(config)) as progress:
        removed, refitted = _refit(start, sample, config, resources, progress)  # before the actors: they take the CPUs
        every_head = [*fitted.path, *(h for fold in fitted.folds for h in fold)]
        with SampleActors(every_head, sample, config, resources) as pool:
            bank = _bank(sample, start, config)
            directions = _answer(pool, fitted, sample, bank, targets, removed, refitted, config, progress)
        _write(url, directions)
    return directions


def _answer(
    pool: SampleActors,
    fitted: FittedHeads,
    sample: Sample,
    bank: Bank,
    targets: list[Target],
    removed: Tensor,
    refitted: list[Heads],
    config: Config,
    progress: Stage,
) -> Directions:
    """The systems solved, the damping chosen by the refits, and what the sample's own scores say of misalignment.

    One target after the other: the bases of the systems are the driver's largest tensors.
    """
    for target in targets:
        gradient(fitted.full, target, target.batches(config), config)  # nothing to improve ends the run before the work
    halves, calibration, facts = list[Tensor](), list[Tensor](), dict[str, Any]()
    for target in targets:
        influence, of_target = _calibrate(pool, fitted, target, removed, refitted, config, progress)
        answers, residual = _cross(pool, fitted, target, of_target["damping"], config, progress)
        covered = coverage(fitted.full, target, sample, config)
        facts[target.name] = {**of_target, "residual": residual, "coverage": covered}
        halves.append(answers)
        calibration.append(influence)
    asked = torch.stack(halves, 2)  # [K, fits, T, 2, P]
    folds = asked.sum(3)
    scores, planted = pool.out_of_sample(asked.flatten(2, 3), bank), pool.out_of_sample(folds, bank, plant=True)
    scores = scores._replace(influence=scores.influence.unflatten(0, (len(targets), 2)))
    misalignment = _misalignment(scores, planted, sample)
    for of_target in facts.values():
        of_target["misaligned"] = misalignment.share.item()
    return Directions(folds, misalignment, bank, scores, torch.cat(calibration), facts)


def _misalignment(real: OutOfSample, planted: OutOfSample, sample: Sample) -> Misalignment:
    """Learned from the sample and from its copy with planted swaps; a swap of two equal captions is none."""
    swapped = torch.from_numpy((sample.texts != sample.texts[sample.partners()]).any(1))
    if not swapped.any():
        raise RunError("all captions of the sampled pairs are alike: nothing tells which belong to their images")
    whole = evidence(*real._replace(influence=real.influence.sum(1)))
    return learn(whole, evidence(*planted)[swapped])


def _bank(sample: Sample, start: Heads, config: Config) -> Bank:
    """Of all sampled pairs, or of BANK of them."""
    rows = np.sort(permutation(len(sample.fold), "bank", config.seed)[:BANK])
    images, texts = (as_features(side[rows], torch.device("cpu")) for side in (sample.images, sample.texts))
    return build(images, texts, torch.from_numpy(sample.fold[rows]), start)


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
    pool: SampleActors,
    fitted: FittedHeads,
    target: Target,
    removed: Tensor,
    refitted: list[Heads],
    config: Config,
    progress: Stage,
) -> tuple[Tensor, dict[str, Any]]:
    """The damping whose predicted losses of the refits rank best, and how well (LDS).

    Returns:
        [G, N] influence on the target's calibration groups at that damping, and the facts.
    """
    candidates, parts = config.solve.dampings, groups(target, config)
    gradients = [gradient(heads, target, part, config) for heads in fitted.path for part in parts]
    systems = [System(c, -1) for c in range(len(fitted.path)) for _ in parts]
    spaces = pool.krylov(systems, torch.stack(gradients), config, progress)
    influence = torch.zeros(len(candidates), len(parts), removed.shape[1])
    for c in range(len(fitted.path)):
        own = KrylovSpaces(*(part[c * len(parts) : (c + 1) * len(parts)] for part in spaces))
        top = own.largest_eigenvalue().max()
        solved = [own.solve(torch.full_like(own.norm, d) * top)[0] for d in candidates]
        influence += pool.influence(System(c, -1), torch.cat(solved)).view(influence.shape) / len(fitted.path)
    best, lds = 0, list[float]()
    if refitted:
        losses = torch.stack([group_losses(heads, target, config) for heads in refitted])
        best, lds = choose_damping(influence, removed, losses)
    reached = {"lds": lds[best] if lds else None, "refits": len(refitted), "lds_of_dampings": lds}
    return influence[best], {"damping": candidates[best], **reached}


def _cross(
    pool: SampleActors, fitted: FittedHeads, target: Target, damping: float, config: Config, progress: Stage
) -> tuple[Tensor, float]:
    """What the halves of a target ask of each fold's heads, answered without the fold's pairs.

    Args:
        damping: in units of the curvature's largest eigenvalue.

    Returns:
        [K, fits, 2, P] directions, and the largest relative residual.
    """
    gradients, systems = [], []
    for f, fits in enumerate(fitted.folds):
        for s, heads in enumerate(fits):
            gradients += [gradient(heads, target, half, config) for half in target.halves(config)]
            systems += [System(len(fitted.path) + f * len(fits) + s, f)] * 2
    spaces = pool.krylov(systems, torch.stack(gradients), config, progress)
    answers, residual = spaces.solve(damping * spaces.largest_eigenvalue())
    return answers.view(config.fit.folds, config.fit.fits, 2, -1), residual.max().item()
