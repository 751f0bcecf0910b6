"""Stage `filter`: which pairs to keep for a target, chosen by refits of the heads (`ecif.columns.filter`)."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.columns import filter as method
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


class Ranking(NamedTuple):
    """The sample's distribution of both scores, through which every shard's pairs are ranked alike, and what was chosen."""

    misalignment: Tensor  # [QUANTILES] float64
    influence: Tensor  # [T, QUANTILES] float64
    facts: dict[str, Any]  # per target: weight, keep, and the loss of every candidate

    def scores(self, misalignment: NDArray[np.float32], influence: NDArray[np.float32]) -> NDArray[np.float32]:
        """[T, N], 0 to 1, high is good: how early each pair is kept, from its misalignment [N] and influence [T, N]."""
        weights = [torch.tensor(chosen["weight"], dtype=torch.float64) for chosen in self.facts.values()]
        rankings = [method.Ranking(self.misalignment, *of_target) for of_target in zip(self.influence, weights, strict=True)]
        probability, of_targets = torch.from_numpy(misalignment), torch.from_numpy(influence)
        return np.stack([r.scores(probability, i).numpy() for r, i in zip(rankings, of_targets, strict=True)])


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
    candidates = method.candidates(settings.weights, settings.keep)
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
            chosen = method.choose(settings.weights, settings.keep, judged, expected)
            tried = [c._asdict() | {"loss": loss} for c, loss in zip(candidates[1:], judged[1:].tolist(), strict=True)]
            facts[target.name] = chosen._asdict() | {"loss_of_everything": judged[0].item(), "tried": tried}
    influence = directions.sample.influence.sum(1)
    probability = _probability(directions, influence)
    rankings = [method.ranking(probability, of_target, 0.0) for of_target in influence]
    tensors = {"misalignment": rankings[0].misalignment, "influence": torch.stack([r.influence for r in rankings])}
    stored.write(url, tensors, **facts)
    return Ranking(**tensors, facts=facts)


def kept(directions: Directions, target: int, half: int, weight: float, keep: float) -> NDArray[np.bool_]:
    """[N] the sampled pairs that a candidate keeps, who is ranked by one half of the target alone."""
    of_half = 2 * directions.sample.influence[:, half]  # as much as the whole
    mask = method.kept(_probability(directions, of_half), of_half[target], method.Candidate(weight, keep))
    return mask.numpy()


def _probability(directions: Directions, influence: Tensor) -> Tensor:
    """[N] that each sampled pair is misaligned, with influence [T, N] for its own."""
    return directions.misalignment.probability(evidence(*directions.sample._replace(influence=influence)))
