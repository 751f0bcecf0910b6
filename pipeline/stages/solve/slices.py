"""The sample, spread over actors: Gauss-Newton products and scores of its pairs, slice by slice."""

from typing import NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.columns.agreement import agreement_with
from ecif.columns.bank import Bank
from ecif.heads import Embedded, Heads, embed
from ecif.heads.curvature import gauss_newton_product
from ecif.heads.influence import PairScores, score
from ecif.losses import Loss
from ecif.solve import KrylovSpaces, krylov
from pipeline.config import Config
from pipeline.stages.fit.sample import Sample
from pipeline.stages.fit.stage import as_features
from pipeline.stages.losses import loss_of
from pipeline.workers.cluster import Resources, device
from pipeline.workers.progress import Stage
from pipeline.workers.slices import SliceActors


class System(NamedTuple):
    """One linear system: whose curvature, and on which pairs."""

    heads: int  # position in the list of heads that the actors hold
    without_fold: int  # pairs of this fold are not part of the curvature; -1 for none


class OutOfSample(NamedTuple):
    """Of the sampled pairs, as in a run's columns: under heads that never saw them, mean over as many batches a pair."""

    held_out_loss: Tensor  # [N] of the fitted heads, mean over the seeds
    clip_score: Tensor  # [N] alike
    agreement: Tensor  # [N] with the bank, under no heads
    influence: Tensor  # [n, N] on n directions, mean over the checkpoints too


class SampleActors(SliceActors):
    """The actors that hold the sample, seen from the reducer."""

    def __init__(self, heads: list[Heads], sample: Sample, config: Config, resources: Resources):
        shared = ray.put((sample, heads, loss_of(config)))
        repeats = [sample.batches(repeat) for repeat in range(config.repeats)]
        super().__init__(_Slices, (shared,), list(zip(*repeats, strict=True)), resources)
        self.repeats = len(repeats)
        self.pairs, self.checkpoints = len(sample.fold), config.fit.checkpoints

    def krylov(self, systems: list[System], gradients: Tensor, config: Config, progress: Stage) -> KrylovSpaces:
        """Conjugate gradient of all systems together; the products are summed over the slices in their order."""

        def product(vectors: Tensor) -> Tensor:
            shared = ray.put((systems, vectors.numpy()))
            total = np.zeros(vectors.shape, np.float32)
            for part in self.each("products", shared):
                total += part
            progress.advance(1)
            return torch.from_numpy(total)

        return krylov(product, gradients, config.solve.iterations)

    def influence(self, system: System, directions: Tensor) -> Tensor:
        """[n, N] influence of every sampled pair on n directions, under one set of heads."""
        shared = ray.put(directions.numpy())
        scores = [PairScores(*p) for p in self.each("score", system.heads, shared)]
        return torch.cat([s.positive + s.negative for s in scores], 1)

    def out_of_sample(self, directions: Tensor, bank: Bank, plant: bool = False) -> OutOfSample:
        """Every sampled pair under the heads that did not see its fold, mean over the fits.

        Args:
            directions: [K, fits, n, P].
            bank: for the agreement.
            plant: score a copy in which the pairs of a fold have each other's captions, see `Sample.partners`.
        """
        fits = directions.shape[1]
        sums = np.zeros((self.pairs, 2 + directions.shape[2]), np.float32)
        for f in range(directions.shape[0]):
            for s in range(fits):
                shared = ray.put(directions[f, s].numpy())
                at_the_end = (s + 1) % self.checkpoints == 0  # influence is of the whole fit, the others are of its end
                weights = np.ones(sums.shape[1], np.float32)
                weights[:2] = self.checkpoints if at_the_end else 0
                for rows, scores in self.each("out_of_sample", self.checkpoints + f * fits + s, shared, f, plant):
                    np.add.at(sums, rows, weights / (fits * self.repeats) * scores)
        loss, cosine, *influence = torch.from_numpy(sums).T
        agreement = torch.cat(list(self.each("agreement", ray.put(bank), plant)))
        return OutOfSample(loss, cosine, agreement, torch.stack(influence))


class _Slices:
    """Actor: some slices of the sample, embedded under every set of heads."""

    def __init__(self, shared: tuple[Sample, list[Heads], Loss], slices: list[list[tuple[NDArray[np.int64], ...]]]):
        """A slice is a list of places for a batch: the rows that are there in each repeat."""
        self.sample, heads, self.loss = shared
        self.device = device()
        self.heads = [h.to(self.device) for h in heads]
        self.partners = self.sample.partners()
        self.slices: list[list[Embedded]] = []
        self.rows: list[NDArray[np.int64]] = []
        self.folds: list[Tensor] = []
        self.batches: list[list[Tensor]] = []
        self.repeated = [[rows for place in places for rows in place] for places in slices]
        for places in slices:
            rows = np.concatenate([place[0] for place in places])
            features = self._features(rows, rows)
            self.slices.append([embed(h, *features) for h in self.heads])
            self.rows.append(rows)
            self.folds.append(torch.from_numpy(self.sample.fold[rows]))
            self.batches.append(_consecutive([place[0] for place in places]))

    def products(self, at: int, shared: tuple[list[System], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Gauss-Newton products [n, P] of one slice, each system with its own heads and pairs."""
        systems, vectors = shared
        out = np.empty_like(vectors)
        for system in dict.fromkeys(systems):
            mine = [i for i, s in enumerate(systems) if s == system]
            pairs = self.slices[at][system.heads]
            batches = (pairs.take(rows[self.folds[at][rows] != system.without_fold]) for rows in self.batches[at])
            directions = torch.tensor(vectors[mine]).to(pairs.u.device)
            out[mine] = gauss_newton_product(self.heads[system.heads], batches, directions, self.loss).cpu().numpy()
        return out

    def score(self, at: int, heads: int, directions: NDArray[np.float32]) -> tuple[Tensor, ...]:
        """Scores of one slice's pairs in their own batches."""
        moved = torch.tensor(directions).to(self.device)
        return tuple(
            part.cpu() for part in score(self.heads[heads], self.slices[at][heads], self.batches[at], moved, self.loss)
        )

    def out_of_sample(
        self, at: int, heads: int, directions: NDArray[np.float32], fold: int, plant: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Loss, cosine and influence of the pairs of a fold in the batches of all repeats.

        Returns:
            [M] rows of the sample, each once a repeat, and their scores [M, 2 + n]; with `plant` those that the fold's pairs
            have with the captions of their partners.
        """
        batches = self.repeated[at]
        rows = np.concatenate(batches)
        mine = self.sample.fold[rows] == fold
        pairs = embed(self.heads[heads], *self._features(rows, np.where(mine, self.partners[rows], rows) if plant else rows))
        moved = torch.tensor(directions).to(self.device)
        scores = score(self.heads[heads], pairs, _consecutive(batches), moved, self.loss)
        found = torch.cat([scores.pair_loss[None], scores.clip_score[None], scores.positive + scores.negative])
        return rows[mine], found.T.cpu().numpy()[mine]

    def agreement(self, at: int, bank: Bank, plant: bool) -> Tensor:
        """Of one slice's pairs with a bank, with the captions of their partners if `plant`."""
        rows = self.rows[at]
        features = self._features(rows, self.partners[rows] if plant else rows)
        return agreement_with(bank.to(self.device), *features, self.folds[at].to(self.device)).cpu()

    def _features(self, images: NDArray[np.int64], texts: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Of rows of the sample, and of the rows whose captions they have."""
        return as_features(self.sample.images[images], self.device), as_features(self.sample.texts[texts], self.device)


def _consecutive(batches: list[NDArray[np.int64]]) -> list[Tensor]:
    return list(torch.arange(sum(map(len, batches))).split([len(b) for b in batches]))
