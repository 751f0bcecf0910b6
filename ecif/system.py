"""Linear systems over the sample of a corpus, and the scores of the sampled pairs.

The sampled pairs are held in slices (`ecif.slices`). `SampleSystem` sums the results of all slices. A subclass decides where
slices are held: in this process, or in a pool of actors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ecif.columns.bank import Bank, build_bank
from ecif.columns.contract import PairScore
from ecif.columns.evidence import Evidence
from ecif.copies import alike, directions
from ecif.heads import Heads
from ecif.heads.cross_fit import FittedHeads
from ecif.permutation import permutation
from ecif.sample import Sample
from ecif.slices import LinearSystem, Result, Shared, Slices, sliced
from ecif.solve import KrylovSpaces, krylov

Item = TypeVar("Item")
BANK = 16_384  # the most pairs that a bank of neighbours holds


class SampleSystem(ABC):
    """All slices of a sample: calls them and sums or joins their results.

    Args:
        sample: the whole sample.
        repeats: number of batch permutations that scores are averaged over.
        fitted: the heads that the slices hold, in the order of `FittedHeads.every`.
    """

    def __init__(self, sample: Sample, repeats: int, fitted: FittedHeads):
        self.sample, self.pairs, self.repeats = sample, len(sample.fold), repeats
        self.folds, self.path, self.checkpoints = len(fitted.folds), len(fitted.path), len(fitted.path)
        self.seeds = len(fitted.folds[0]) // self.checkpoints

    @abstractmethod
    def each(self, method: str, *arguments: Any) -> Iterator[Any]:
        """What a method of `Slices` returns for each slice, in their order."""

    @abstractmethod
    def krylov(self, systems: list[LinearSystem], gradients: Tensor, steps: int) -> KrylovSpaces:
        """Krylov spaces of all systems together; gradients [n, P]. Products are summed over slices in the order of `halves`."""

    def spread(self, function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
        """A function of each item, which needs no slice: here if the slices are, else on workers."""
        return [function(item) for item in items]

    def influence(self, heads: int, directions: Tensor) -> Tensor:
        """[n, N] influence of every sampled pair on n directions, under one set of heads."""
        return torch.cat(list(self.each("influence", heads, directions)), 1)

    def held_out_influence(self, directions: Tensor, plant: bool = False) -> Tensor:
        """Cross-fitted influence [n, N] of every sampled pair, mean over seeds, checkpoints and repeats.

        Each pair is scored by heads fitted without its fold. The score table averages over the same number of repeats.

        Args:
            directions: [K, fits, n, P].
            plant: score planted swaps: each pair has the caption of its partner in the same fold, see `Sample.partners`.
        """
        folds, fits, count, _ = directions.shape
        sums = torch.zeros(self.pairs, count)
        for f in range(folds):
            for s in range(fits):
                arguments = (self.path + f * fits + s, directions[f, s], f, plant)
                for rows, values in self.each("held_out_influence", *arguments):
                    sums.index_add_(0, rows, values / (fits * self.repeats))
        return sums.T.contiguous()

    def agreement(self, bank: Bank, without: list[int], plant: bool = False) -> Tensor:
        """[W, N] agreement of every sampled pair with a target's pairs.

        Args:
            bank: the target's pairs.
            without: see `agreement_with_target`.
            plant: see `held_out_influence`.
        """
        return torch.cat(list(self.each("agreement", bank, without, plant)), 1)

    def scores(self, scores: list[PairScore], plant: bool = False) -> Tensor:
        """Cross-fitted scores [E, N] of every sampled pair, under the fitted heads.

        Args:
            scores: E scores.
            plant: see `held_out_influence`.
        """
        out = torch.zeros(len(scores), self.pairs)
        of_fold = [i for i, s in enumerate(scores) if s.of_fold]
        others = [i for i, s in enumerate(scores) if not s.of_fold]
        if others:
            out[others] = torch.cat(list(self.each("scores", [scores[i] for i in others], plant))).T
        if of_fold:
            sums = torch.zeros(self.pairs, len(of_fold))
            for f in range(self.folds):
                ends = [self.path + (f * self.seeds + s + 1) * self.checkpoints - 1 for s in range(self.seeds)]
                for rows, values in self.each("held_out_scores", [scores[i] for i in of_fold], ends, f, plant):
                    sums.index_add_(0, rows, values / self.repeats)
            out[of_fold] = sums.T
        return out


class LocalSystem(SampleSystem):
    """All slices in this process; arguments are those of `Slices` and `SampleSystem`."""

    def __init__(self, fitted: FittedHeads, shared: Shared, repeats: int):
        super().__init__(shared.sample, repeats, fitted)
        self.slices = Slices(shared, sliced(shared.sample.places(repeats)), fitted.full.image.device)

    def each(self, method: str, *arguments: Any) -> Iterator[Any]:
        """What a method of `Slices` returns for each slice, in their order."""
        return (getattr(self.slices, method)(at, *arguments) for at in range(len(self.slices.slices)))

    def product(self, systems: list[LinearSystem], vectors: Tensor) -> Tensor:
        """H vectors [n, P] of every system: `Slices.products` over all slices."""
        return self.slices.products(0, len(self.slices.slices), systems, vectors)

    def krylov(self, systems: list[LinearSystem], gradients: Tensor, steps: int) -> KrylovSpaces:
        """Krylov spaces of all systems together."""
        return krylov(lambda vectors: self.product(systems, vectors), gradients, steps)


def sample_bank(sample: Sample, checkpoint: Heads, seed: int) -> Bank:
    """A bank of all sampled pairs, or of BANK random ones if there are more; `checkpoint` are the model's own heads."""
    rows = permutation(len(sample.fold), "bank", seed)[:BANK].sort().values
    return build_bank(*sample.features(rows, rows, torch.device("cpu")), sample.fold[rows], checkpoint)


def gather_evidence(system: SampleSystem, scores: list[PairScore], bank: Bank) -> Evidence:
    """The evidence that misalignment is learned from, without the influence on targets.

    Args:
        system: the sample.
        scores: E scores that count as evidence.
        bank: the bank that the slices hold.
    """
    sample = system.sample
    return Evidence(system.scores(scores), system.scores(scores, plant=True), _swapped(sample), sample.fold, bank)


def _swapped(sample: Sample) -> Tensor:
    """[N] bool: whether a planted swap is one. It is not if the pair gets the caption of a copy, or one that says the same."""
    partner = sample.partners()
    captions = directions(sample.texts, sample.texts.double().mean(0))
    other = partner != torch.arange(len(partner)) if sample.group is None else sample.group != sample.group[partner]
    return other & ~alike(captions, captions[partner])
