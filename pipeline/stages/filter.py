"""Stage `filter`: which pairs to keep for a target, by trying it.

Which pairs are misaligned and which pairs harm the target are two questions; what weight each deserves, and how many pairs to
keep, belongs to the corpus. Every candidate ranks the sample by misalignment and by influence on one half of the target, drops
the worst, and has the heads fitted anew on what is left, from where they began. No label is seen, and no test set.

Both halves judge. The half that asked is too kind: what it asked for was kept. The other one is too harsh: of what only it asks
about, much was dropped, as it would not be if the whole target asked. Their mean is nearer, and a little kind (docs/method.md).
"""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.columns.misalignment import evidence
from ecif.heads import Heads
from pipeline.config import Config, Filter
from pipeline.run_folder import tensors as stored
from pipeline.stages.fit.sample import Sample
from pipeline.stages.fit.stage import Refit, refit_all
from pipeline.stages.solve.stage import Directions
from pipeline.stages.solve.targets import Target, target_loss
from pipeline.workers.cluster import Resources
from pipeline.workers.progress import Stage

QUANTILES = 1025
OVERRATED = 0.01  # share of the judges' loss by which a candidate may seem better and not be
ENOUGH_GAIN = 0.02  # share of the judges' loss; on a corpus without a misaligned pair the best candidate seemed to gain 0.012


class Ranking(NamedTuple):
    """The sample's distribution of both scores, through which every shard's pairs are ranked alike, and what was chosen."""

    misalignment: Tensor  # [QUANTILES] float64
    influence: Tensor  # [T, QUANTILES] float64
    facts: dict[str, Any]  # per target: weight, keep, and the loss of every candidate

    def scores(self, misalignment: NDArray[np.float32], influence: NDArray[np.float32]) -> NDArray[np.float32]:
        """[T, N], 0 to 1, high is good: how early each pair is kept, from its misalignment [N] and influence [T, N]."""
        aligned = 1 - _rank(misalignment, self.misalignment)
        ranks = [_rank(of_target, known) for of_target, known in zip(influence, self.influence, strict=True)]
        weights = [chosen["weight"] for chosen in self.facts.values()]
        fused = [(1 - weight) * aligned + weight * rank for weight, rank in zip(weights, ranks, strict=True)]
        return np.array(fused, np.float32)


def read_ranking(url: str) -> Ranking:
    """What an earlier call chose; FileNotFoundError if there is nothing."""
    tensors, facts = stored.read(url)
    return Ranking(**tensors, facts=facts)


def choose_filter(
    url: str,
    start: Heads,
    sample: Sample,
    directions: Directions,
    targets: list[Target],
    settings: Filter,
    config: Config,
    resources: Resources,
) -> Ranking:
    """Choose for every target, or read what was chosen if it is there.

    Args:
        url: where the choice goes.
        start: where fits begin.
        sample: that the heads are fitted on anew without what a candidate drops.
        directions: what `solve` left.
        targets: by name.
        settings: the candidates.
        config: of the run.
        resources: of the fits.
    """
    try:
        return read_ranking(url)
    except FileNotFoundError:
        pass
    candidates = [(0.0, 1.0), *product(settings.weights, settings.keep)]  # the first keeps everything
    masks = [kept(directions, t, half, *c) for t in range(len(targets)) for half in range(2) for c in candidates]
    jobs = [Refit(mask, config.seed + seed, new_batches=True) for mask in masks for seed in range(settings.seeds)]
    with Stage("filter", len(jobs)) as progress:
        fitted = refit_all(start, sample, jobs, config, resources, progress)
        halves = [[torch.cat(half) for half in target.halves(config)] for target in targets]
        per_target, expected = len(jobs) // len(targets), 1 - directions.misalignment.share.item()
        facts = {}
        for t, target in enumerate(targets):
            losses = [
                [target_loss(heads, target, config, rows) for rows in halves[t]]
                for heads in fitted[t * per_target : (t + 1) * per_target]
            ]
            judged = torch.tensor(losses, dtype=torch.float64).view(2, len(candidates), settings.seeds, 2).mean((0, 2, 3))
            facts[target.name] = choose(settings, expected, judged[0].item(), judged[1:])
    influence = directions.sample.influence.sum(1)
    probability = _probability(directions, influence)
    grid = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    tensors = {
        "misalignment": probability.quantile(grid),
        "influence": influence.double().quantile(grid, dim=1).T.contiguous(),
    }
    stored.write(url, tensors, **facts)
    return Ranking(**tensors, facts=facts)


def kept(directions: Directions, target: int, half: int, weight: float, keep: float) -> NDArray[np.bool_]:
    """[N] the sampled pairs that a candidate keeps, who is ranked by one half of the target alone."""
    of_half = 2 * directions.sample.influence[:, half]  # as much as the whole
    score = (1 - weight) * _position(-_probability(directions, of_half)) + weight * _position(of_half[target])
    mask = np.zeros(len(score), bool)
    mask[score.argsort(descending=True, stable=True)[: round(keep * len(score))].numpy()] = True
    return mask


def choose(settings: Filter, expected: float, everything: float, losses: Tensor) -> dict[str, Any]:
    """The budget, over all weights, then the weight at it.

    The half that asked overrates what it asked for. So what is about as good as the best gives way to what is known without
    it: of budgets the one nearest to the share that is expected to be aligned, of weights the one that gives influence least.

    Args:
        settings: W weights and K budgets.
        expected: share of the pairs that are aligned.
        everything: the judges' loss when nothing is dropped.
        losses: [W x K] theirs after each candidate.

    Returns:
        `weight` and `keep`, 1 if the best is no gain of ENOUGH_GAIN; the losses.
    """
    weights, keep = settings.weights, settings.keep
    table = losses.view(len(weights), len(keep))
    k = min(_alike(table.mean(0)), key=lambda i: abs(keep[i] - expected))
    w = min(_alike(table[:, k]), key=lambda i: weights[i])
    enough = table[:, k].min() < (1 - ENOUGH_GAIN) * everything
    tried = [
        {"weight": weights[i], "keep": keep[j], "loss": table[i, j].item()}
        for i in range(len(weights))
        for j in range(len(keep))
    ]
    chosen = {"weight": weights[w], "keep": keep[k] if enough else 1.0}
    return chosen | {"loss": table[w, k].item() if enough else everything, "loss_of_everything": everything, "tried": tried}


def _alike(losses: Tensor) -> list[int]:
    """Which are about as good as the best."""
    return [i for i, loss in enumerate(losses.tolist()) if loss <= (1 + OVERRATED) * losses.min().item()]


def _probability(directions: Directions, influence: Tensor) -> Tensor:
    """[N] that each sampled pair is misaligned, with influence [T, N] for its own."""
    return directions.misalignment.probability(evidence(*directions.sample._replace(influence=influence)))


def _position(values: Tensor) -> Tensor:
    """Ranks 0 to 1."""
    return values.argsort(stable=True).argsort() / max(1, len(values) - 1)


def _rank(values: NDArray[np.float32], quantiles: Tensor) -> NDArray[np.float64]:
    known = quantiles.numpy()
    return np.interp(values.astype(np.float64), known, np.linspace(0, 1, len(known)))
