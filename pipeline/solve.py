"""Stage `solve`: the shared inverse-Hessian system, q = (H + damping I)^-1 grad L_T for every target and set of heads.

Actors hold slices of the sampled features and return Gauss-Newton products; the reducer sums them in fixed order and takes the
conjugate gradient steps of all systems together. The damping is the one whose predictions agree best with real refits.
"""

from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.curvature import gauss_newton_product, loss_gradient
from ecif.evaluation import linear_datamodeling_score, target_losses
from ecif.heads import Embedded, Heads, embed
from ecif.influence import PairScores, score
from ecif.solve import KrylovSpaces, krylov
from pipeline import heads as stored
from pipeline.cluster import Resources, device
from pipeline.config import Config
from pipeline.fit import FittedHeads, Refit, as_features, refit_all
from pipeline.progress import Stage
from pipeline.sample import Sample
from pipeline.shards import permutation

MAX_SLICES = 32  # of the sample: the unit in which products are summed, whatever the number of actors
CALIBRATION_GROUPS = 8  # parts of a target whose losses are predicted separately
REMOVED = 0.3  # share of the sample that a calibration refit goes without
QUANTILES = 1025


class Target(NamedTuple):
    """A clean set: its improvement counts."""

    name: str
    images: NDArray[np.float16]
    texts: NDArray[np.float16]

    def batches(self, config: Config) -> list[Tensor]:
        """Rows that share a softmax in the target's loss."""
        order = torch.from_numpy(permutation(len(self.images), "target", self.name, config.seed))
        parts = list(order.split(config.solve.target_batch))
        if len(parts) > 1 and 2 * len(parts[-1]) < config.solve.target_batch:
            parts[-2:] = [torch.cat(parts[-2:])]
        return parts


class Directions(NamedTuple):
    """What `score` needs to answer for every pair."""

    folds: Tensor  # [K, seeds, T, P]
    held_out_loss: Tensor  # [QUANTILES] of the sample, out of sample
    influence: Tensor  # [T, QUANTILES] of the sample, out of sample
    calibration: Tensor  # [G, N] influence of the sample on every calibration group under the full heads, targets in turn
    facts: dict[str, Any]  # damping and the agreement with refits that it reached, per target


class System(NamedTuple):
    """One linear system: whose curvature, and on which pairs."""

    heads: int  # position in the list of heads that the actors hold
    without_fold: int  # pairs of this fold are not part of the curvature; -1 for none


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
        every_head = [fitted.full, *(h for fold in fitted.folds for h in fold)]
        pool = _Pool(every_head, sample, resources)
        calibration, crossed = _systems(fitted, targets, config)
        gradients = [g for g, _ in calibration + crossed]
        spaces = pool.krylov([s for _, s in calibration + crossed], torch.stack(gradients), config, progress)
        ours, theirs = _cut(spaces, 0, len(calibration)), _cut(spaces, len(calibration), len(gradients))
        calibrated, facts = _calibrate(pool, ours, removed, refitted, targets, config)
        relative = torch.tensor([facts[t.name]["damping"] for t in targets], dtype=torch.float64)
        shape = (config.fit.folds, config.fit.seeds, len(targets))
        directions, residual = theirs.solve(relative.repeat(shape[0] * shape[1]) * theirs.largest_eigenvalue())
        for i, target in enumerate(targets):
            facts[target.name]["residual"] = residual[i :: len(targets)].max().item()
        folds = directions.view(*shape, -1)
        held_out_loss, influence = pool.out_of_sample(folds, config)
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
    for target in targets:
        for group in _groups(target, config):
            calibration.append((_gradient(fitted.full, target, group), System(0, -1)))
    for f, seeds in enumerate(fitted.folds):
        for s, heads in enumerate(seeds):
            for target in targets:
                system = System(1 + f * config.fit.seeds + s, f)
                crossed.append((_gradient(heads, target, target.batches(config)), system))
    return calibration, crossed


def _groups(target: Target, config: Config) -> list[list[Tensor]]:
    """The target's batches in up to CALIBRATION_GROUPS parts of about the same size."""
    batches = target.batches(config)
    count = min(CALIBRATION_GROUPS, len(batches))
    return [batches[i::count] for i in range(count)]


def _gradient(heads: Heads, target: Target, batches: list[Tensor]) -> Tensor:
    images, texts = (as_features(m, heads.image.device) for m in (target.images, target.texts))
    return loss_gradient(heads, [embed(heads, images[rows], texts[rows]) for rows in batches])


def group_losses(heads: Heads, target: Target, config: Config) -> Tensor:
    """[G] the loss of each calibration group of a target under these heads."""
    images, texts = (as_features(m, heads.image.device) for m in (target.images, target.texts))
    return torch.stack([target_losses(heads, images, texts, group).sum() for group in _groups(target, config)])


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
    pool: "_Pool", spaces: KrylovSpaces, removed: Tensor, refitted: list[Heads], targets: list[Target], config: Config
) -> tuple[Tensor, dict[str, Any]]:
    """Per target: the damping whose predicted losses of the refits rank best, and how well (LDS).

    Returns:
        [G, N] influence on every calibration group at the damping chosen for its target, and the facts.
    """
    candidates = config.solve.dampings
    top = spaces.largest_eigenvalue().max()
    solved = [spaces.solve(torch.full_like(spaces.norm, d) * top)[0] for d in candidates]
    influence = pool.influence(System(0, -1), torch.cat(solved), config).view(len(candidates), len(spaces.norm), -1)
    chosen: list[Tensor] = []
    facts: dict[str, Any] = {}
    for target in targets:
        of_target = influence[:, sum(map(len, chosen)) :][:, : len(_groups(target, config))]
        best, lds = 0, [float("nan")]
        if refitted:
            losses = torch.stack([group_losses(heads, target, config) for heads in refitted])
            lds = [linear_datamodeling_score(scores, removed, losses) for scores in of_target]
            best = max(range(len(lds)), key=lds.__getitem__)
        facts[target.name] = {"damping": candidates[best], "lds": lds[best], "refits": len(refitted), "lds_of_dampings": lds}
        chosen.append(of_target[best])
    return torch.cat(chosen), facts


def _cut(spaces: KrylovSpaces, first: int, last: int) -> KrylovSpaces:
    return KrylovSpaces(*(part[first:last] for part in spaces))


class _Pool:
    """The actors that hold the sample, seen from the reducer."""

    def __init__(self, heads: list[Heads], sample: Sample, resources: Resources):
        batches = sample.batches()
        count = min(MAX_SLICES, len(batches))
        slices = [batches[i * len(batches) // count : (i + 1) * len(batches) // count] for i in range(count)]
        shared = ray.put((sample, heads))
        actor: Any = ray.remote(**resources.actor)(_Slices)
        actors = [actor.remote(shared, slices[i :: resources.workers]) for i in range(min(resources.workers, count))]
        self.slices = [(actors[i % resources.workers], i // resources.workers) for i in range(count)]
        self.fold = torch.from_numpy(sample.fold)
        self.heads = heads

    def krylov(self, systems: list[System], gradients: Tensor, config: Config, progress: Stage) -> KrylovSpaces:
        """Conjugate gradient of all systems together; the products are summed over the slices in their order."""

        def product(vectors: Tensor) -> Tensor:
            shared = ray.put((systems, vectors.numpy()))
            total = np.zeros(vectors.shape, np.float32)
            for part in [actor.products.remote(i, shared) for actor, i in self.slices]:
                total += ray.get(part)
            progress.advance(1)
            return torch.from_numpy(total)

        return krylov(product, gradients, config.solve.iterations)

    def influence(self, system: System, directions: Tensor, config: Config) -> Tensor:
        """[n, N] influence of every sampled pair on n directions, under one set of heads."""
        shared = ray.put(directions.numpy())
        parts = [actor.score.remote(i, system.heads, shared, config.score.negative) for actor, i in self.slices]
        scores = [PairScores(*p) for p in ray.get(parts)]
        return torch.cat([s.positive + s.negative for s in scores], 1)

    def out_of_sample(self, directions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
        """Loss [N] and influence [T, N] of every sampled pair under the heads that did not see its fold, mean over seeds."""
        loss, influence = torch.zeros(len(self.fold)), torch.zeros(directions.shape[2], len(self.fold))
        for f in range(directions.shape[0]):
            mine = self.fold == f
            for s in range(directions.shape[1]):
                shared = ray.put(directions[f, s].numpy())
                head = 1 + f * directions.shape[1] + s
                parts = ray.get([a.score.remote(i, head, shared, config.score.negative) for a, i in self.slices])
                scores = PairScores(*(torch.cat(p, -1) for p in zip(*parts, strict=True)))
                loss[mine] += scores.pair_loss[mine] / directions.shape[1]
                influence[:, mine] += (scores.positive + scores.negative)[:, mine] / directions.shape[1]
        return loss, influence


class _Slices:
    """Actor: some slices of the sample, embedded under every set of heads."""

    def __init__(self, shared: tuple[Sample, list[Heads]], slices: list[list[NDArray[np.int64]]]):
        sample, heads = shared
        to = device()
        self.heads = [h.to(to) for h in heads]
        self.slices: list[list[Embedded]] = []
        self.folds: list[Tensor] = []
        self.batches: list[list[Tensor]] = []
        for batches in slices:
            rows = np.concatenate(batches)
            images, texts = as_features(sample.images[rows], to), as_features(sample.texts[rows], to)
            self.slices.append([embed(h, images, texts) for h in self.heads])
            self.folds.append(torch.from_numpy(sample.fold[rows]))
            self.batches.append(list(torch.arange(len(rows)).split([len(b) for b in batches])))

    def products(self, at: int, shared: tuple[list[System], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Gauss-Newton products [n, P] of one slice, each system with its own heads and pairs."""
        systems, vectors = shared
        out = np.empty_like(vectors)
        for system in dict.fromkeys(systems):
            mine = [i for i, s in enumerate(systems) if s == system]
            pairs = self.slices[at][system.heads]
            batches = (pairs.take(rows[self.folds[at][rows] != system.without_fold]) for rows in self.batches[at])
            directions = torch.tensor(vectors[mine]).to(pairs.u.device)
            out[mine] = gauss_newton_product(self.heads[system.heads], batches, directions).cpu().numpy()
        return out

    def score(self, at: int, heads: int, directions: NDArray[np.float32], negative: Any) -> tuple[Tensor, ...]:
        """Scores of one slice's pairs in their own batches."""
        pairs = self.slices[at][heads]
        moved = torch.tensor(directions).to(pairs.u.device)
        return tuple(part.cpu() for part in score(self.heads[heads], pairs, self.batches[at], moved, negative))
