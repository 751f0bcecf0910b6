"""Slices of a sample: what a process that holds some of them computes.

Products and scores are computed slice by slice and summed in a fixed order, so no number depends on how many processes hold the
slices. `ecif.system` sums the results of all slices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ecif.batching import Stack
from ecif.columns.agreement import agreement_with_target
from ecif.columns.bank import Bank
from ecif.columns.contract import HeldOutPairs, PairScore
from ecif.heads import Embedded, Heads, embed
from ecif.heads.cross_fit import TOGETHER
from ecif.heads.curvature import SeveralHeads, gauss_newton_products
from ecif.heads.influence import PairScores, score
from ecif.losses import Loss
from ecif.sample import Sample, consecutive

MAX_SLICES = 32
Result = TypeVar("Result")


class LinearSystem(NamedTuple):
    """One linear system: the heads at which the curvature is taken, and the pairs that it is summed over."""

    heads: int  # position in the list of heads that the slices hold
    without_fold: int  # the fold whose pairs are left out of the curvature; -1 leaves out none


class Shared(NamedTuple):
    """The objects that every process with slices holds in full."""

    sample: Sample
    heads: list[Heads]  # all fitted heads; methods refer to them by position
    checkpoint: Heads  # the model's own heads
    loss: Loss  # the loss that the heads were fitted to
    bank: Bank


class _Slice(NamedTuple):
    """One slice: some batches of the sample."""

    first: list[Tensor]  # rows of its batches in the fit
    repeated: list[Tensor]  # rows of its batches in all repeats
    rows: Tensor  # [M] of its pairs
    embedded: Embedded  # its pairs; embeddings [S, M, d], one for every set of heads


class Slices:
    """Some slices of the sample, embedded under every set of heads.

    Args:
        shared: the sample and the heads.
        slices: for each slice, the places of its batches, see `Sample.places`.
        device: where to compute.
    """

    def __init__(self, shared: Shared, slices: list[list[tuple[Tensor, ...]]], device: torch.device):
        self.sample, self.loss, self.device = shared.sample.to(device), shared.loss, device
        self.heads = [h.to(device) for h in shared.heads]
        self.checkpoint, self.bank = shared.checkpoint.to(device), shared.bank.to(device)
        self.partners = self.sample.partners()
        self.slices = [self._slice(places) for places in slices]
        self._prepared = dict[Any, Any]()  # what products need again and again

    def products(self, first: int, count: int, systems: list[LinearSystem], vectors: Tensor) -> Tensor:
        """Gauss-Newton products [n, P], summed over some slices: vector i is multiplied by the curvature of system i.

        Args:
            first: position of the first slice.
            count: number of slices, summed in the order of `halves`.
            systems: n systems.
            vectors: [n, P], on the device of the slices, as the products are.
        """
        return halves(count, lambda at: self._products(first + at, systems, vectors))

    def _products(self, at: int, systems: list[LinearSystem], vectors: Tensor) -> Tensor:
        out = torch.empty_like(vectors)
        for some, places in self._once(("together", *systems), lambda: self._together(systems)):
            prepare = partial(self._curvature, at, some, len(places))
            several, batches = self._once((at, len(places), *some), prepare)
            out[places] = gauss_newton_products(several, batches, vectors[places], self.loss)
        return out

    def _together(self, systems: list[LinearSystem]) -> list[tuple[list[LinearSystem], Tensor]]:
        """Systems that are computed together, and where their vectors are: [n, S], of each system as many as of the others."""
        mine: dict[LinearSystem, list[int]] = {}
        for i, system in enumerate(systems):
            mine.setdefault(system, []).append(i)
        most, found = TOGETHER[self.device.type], []
        for count in {len(places): None for places in mine.values()}:
            asked = [system for system, places in mine.items() if len(places) == count]
            for some in (asked[i : i + most] for i in range(0, len(asked), most)):
                found.append((some, torch.tensor([mine[system] for system in some]).T.to(self.device)))
        return found

    def _curvature(self, at: int, systems: list[LinearSystem], vectors: int) -> tuple[SeveralHeads, list[Stack]]:
        here = self.slices[at]
        fold, rows = self.sample.fold[here.rows], consecutive(here.first)
        kept = [[batch[fold[batch] != system.without_fold] for batch in rows] for system in systems]
        sets = [system.heads for system in systems]
        several = SeveralHeads.of([self.heads[i] for i in sets], here.embedded.under(sets))
        return several, several.stacks(kept, vectors, self.loss)

    def _once(self, key: Any, make: Callable[[], Result]) -> Result:
        if key not in self._prepared:
            self._prepared[key] = make()
        return cast(Result, self._prepared[key])

    def influence(self, at: int, heads: int, directions: Tensor) -> Tensor:
        """Influence [n, M] of one slice's pairs on n directions, in the batches of the fit."""
        scores = self._score(self.slices[at].embedded.under(heads), heads, self.slices[at].first, directions)
        return (scores.positive + scores.negative).cpu()

    def held_out_influence(self, at: int, heads: int, directions: Tensor, fold: int, plant: bool) -> tuple[Tensor, Tensor]:
        """Influence of one fold's pairs in the batches of all repeats.

        Args:
            at: position of the slice.
            heads: position of heads that were fitted without the fold.
            directions: [n, P].
            fold: the fold whose pairs are scored.
            plant: give the fold's pairs the captions of their partners.

        Returns:
            [M] rows of the sample, each once for every repeat, and their influence [M, n].
        """
        rows, images, texts, mine = self._with_plants(at, fold, plant)
        scores = self._score(embed(self.heads[heads], images, texts), heads, self.slices[at].repeated, directions)
        return rows[mine], (scores.positive + scores.negative).T.cpu()[mine]

    def held_out_scores(
        self, at: int, scores: list[PairScore], heads: list[int], fold: int, plant: bool
    ) -> tuple[Tensor, Tensor]:
        """Scores of one fold's pairs under heads that were fitted without the fold, in the batches of all repeats.

        Args:
            at: position of the slice.
            scores: E scores that depend on fitted heads (`of_fold`).
            heads: positions of the fitted heads, one for each seed.
            fold: the fold whose pairs are scored.
            plant: give the fold's pairs the captions of their partners.

        Returns:
            [M] rows of the sample, each once for every repeat, and their scores [M, E].
        """
        rows, images, texts, mine = self._with_plants(at, fold, plant)
        pairs = self._pairs(rows, images, texts, self.slices[at].repeated, [self.heads[h] for h in heads])
        return rows[mine], torch.stack([s.values(pairs).cpu() for s in scores], 1)[mine]

    def scores(self, at: int, scores: list[PairScore], plant: bool) -> Tensor:
        """Scores [M, E] that do not depend on fitted heads, of one slice's pairs in the batches of the fit.

        With `plant`, every pair has the caption of its partner.
        """
        rows = self.slices[at].rows
        features = self.sample.features(rows, self.partners[rows] if plant else rows, self.device)
        pairs = self._pairs(rows, *features, self.slices[at].first, [])
        return torch.stack([s.values(pairs).cpu() for s in scores], 1)

    def agreement(self, at: int, bank: Bank, without: list[int], plant: bool) -> Tensor:
        """Agreement [W, M] of one slice's pairs with a target's.

        Args:
            at: position of the slice.
            bank: the target's pairs.
            without: see `agreement_with_target`.
            plant: give every pair the caption of its partner.
        """
        rows = self.slices[at].rows
        features = self.sample.features(rows, self.partners[rows] if plant else rows, self.device)
        return agreement_with_target(bank.to(self.device), *features, without).cpu()

    def _slice(self, places: list[tuple[Tensor, ...]]) -> _Slice:
        first = [place[0] for place in places]
        rows = torch.cat(first)
        features = self.sample.features(rows, rows, self.device)  # all sets of heads share them
        under = zip(*(embed(heads, *features)[2:] for heads in self.heads), strict=True)
        embedded = Embedded(*features, *map(torch.stack, under))
        return _Slice(first, [batch for place in places for batch in place], rows, embedded)

    def _with_plants(self, at: int, fold: int, plant: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A slice's rows in all repeats, their image and text features, and a mask [rows] of those in the fold."""
        rows = torch.cat(self.slices[at].repeated)
        mine = self.sample.fold[rows] == fold
        texts = torch.where(mine, self.partners[rows], rows) if plant else rows
        return rows, *self.sample.features(rows, texts, self.device), mine

    def _pairs(self, rows: Tensor, images: Tensor, texts: Tensor, batches: list[Tensor], fitted: list[Heads]) -> HeldOutPairs:
        together = [r.to(self.device) for r in consecutive(batches)]
        fold = self.sample.fold[rows].to(self.device)
        return HeldOutPairs(images, texts, fold, together, self.checkpoint, fitted, self.loss, self.bank)

    def _score(self, pairs: Embedded, heads: int, batches: list[Tensor], directions: Tensor) -> PairScores:
        return score(self.heads[heads], pairs, consecutive(batches), directions.to(self.device), self.loss)


def sliced(items: list[Any]) -> list[list[Any]]:
    """Cut a list, in order, into at most MAX_SLICES parts of about the same size."""
    count = min(MAX_SLICES, len(items))
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]


def halves(count: int, term: Callable[[int], Tensor]) -> Tensor:
    """The sum of `count` terms, that of the first half plus that of the second: so any half can be summed somewhere else."""
    return term(0) if count == 1 else halves(half := count // 2, term) + halves(count - half, lambda at: term(half + at))
