"""The sample, spread over actors: Gauss-Newton products and scores of its pairs, slice by slice."""

from typing import NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.curvature import gauss_newton_product
from ecif.heads import Embedded, Heads, embed
from ecif.influence import PairScores, score
from ecif.losses import Loss
from ecif.solve import KrylovSpaces, krylov
from pipeline.actors import SliceActors
from pipeline.cluster import Resources, device
from pipeline.config import Config
from pipeline.fit import as_features
from pipeline.losses import loss_of
from pipeline.progress import Stage
from pipeline.sample import Sample


class System(NamedTuple):
    """One linear system: whose curvature, and on which pairs."""

    heads: int  # position in the list of heads that the actors hold
    without_fold: int  # pairs of this fold are not part of the curvature; -1 for none


class OutOfSample(NamedTuple):
    """Scores of the sampled pairs under heads that never saw them."""

    held_out_loss: Tensor  # [N] of the fitted heads, mean over the seeds
    clip_score: Tensor  # [N] alike
    influence: Tensor  # [n, N] on n directions, mean over the checkpoints too


class SampleActors:
    """The actors that hold the sample, seen from the reducer."""

    def __init__(self, heads: list[Heads], sample: Sample, config: Config, resources: Resources):
        shared = ray.put((sample, heads, loss_of(config)))
        self.slices = SliceActors(_Slices, (shared,), sample.batches(), resources)
        self.fold = torch.from_numpy(sample.fold)
        self.heads = heads
        self.checkpoints = config.fit.checkpoints

    def krylov(self, systems: list[System], gradients: Tensor, config: Config, progress: Stage) -> KrylovSpaces:
        """Conjugate gradient of all systems together; the products are summed over the slices in their order."""

        def product(vectors: Tensor) -> Tensor:
            shared = ray.put((systems, vectors.numpy()))
            total = np.zeros(vectors.shape, np.float32)
            for part in self.slices.each("products", shared):
                total += part
            progress.advance(1)
            return torch.from_numpy(total)

        return krylov(product, gradients, config.solve.iterations)

    def influence(self, system: System, directions: Tensor) -> Tensor:
        """[n, N] influence of every sampled pair on n directions, under one set of heads."""
        shared = ray.put(directions.numpy())
        scores = [PairScores(*p) for p in self.slices.each("score", system.heads, shared)]
        return torch.cat([s.positive + s.negative for s in scores], 1)

    def out_of_sample(self, directions: Tensor, plant: bool = False) -> OutOfSample:
        """Every sampled pair under the heads that did not see its fold, mean over the fits.

        Args:
            directions: [K, fits, n, P].
            plant: score a copy in which the pairs of the fold have each other's captions, see `Sample.partners`.
        """
        fits, shape = directions.shape[1], (directions.shape[2], len(self.fold))
        out = OutOfSample(torch.zeros(shape[1]), torch.zeros(shape[1]), torch.zeros(shape))
        for f in range(directions.shape[0]):
            mine = self.fold == f
            for s in range(fits):
                shared = ray.put(directions[f, s].numpy())
                parts = self.slices.each("score", self.checkpoints + f * fits + s, shared, f if plant else -1)
                scores = PairScores(*(torch.cat(p, -1) for p in zip(*parts, strict=True)))
                if (s + 1) % self.checkpoints == 0:
                    out.held_out_loss[mine] += scores.pair_loss[mine] * (self.checkpoints / fits)
                    out.clip_score[mine] += scores.clip_score[mine] * (self.checkpoints / fits)
                out.influence[:, mine] += (scores.positive + scores.negative)[:, mine] / fits
        return out


class _Slices:
    """Actor: some slices of the sample, embedded under every set of heads."""

    def __init__(self, shared: tuple[Sample, list[Heads], Loss], slices: list[list[NDArray[np.int64]]]):
        sample, heads, self.loss = shared
        to = device()
        self.heads = [h.to(to) for h in heads]
        self.slices: list[list[Embedded]] = []
        self.folds: list[Tensor] = []
        self.batches: list[list[Tensor]] = []
        self.partners: list[Tensor] = []
        partners = sample.partners()
        for batches in slices:
            rows = np.concatenate(batches)
            images, texts = as_features(sample.images[rows], to), as_features(sample.texts[rows], to)
            self.slices.append([embed(h, images, texts) for h in self.heads])
            self.folds.append(torch.from_numpy(sample.fold[rows]))
            self.batches.append(list(torch.arange(len(rows)).split([len(b) for b in batches])))
            self.partners.append(as_features(sample.texts[partners[rows]], to))

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

    def score(self, at: int, heads: int, directions: NDArray[np.float32], plant: int = -1) -> tuple[Tensor, ...]:
        """Scores of one slice's pairs in their own batches, those of the fold `plant` with the captions of their partners."""
        pairs = self.slices[at][heads]
        if plant >= 0:
            swapped = (self.folds[at] == plant).to(pairs.u.device)[:, None]
            pairs = embed(self.heads[heads], pairs.images, self.partners[at].where(swapped, pairs.texts))
        moved = torch.tensor(directions).to(pairs.u.device)
        return tuple(part.cpu() for part in score(self.heads[heads], pairs, self.batches[at], moved, self.loss))
