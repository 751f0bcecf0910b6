"""The sample of a corpus: heads are fitted on it, and linear systems are solved over it (`ecif.system`)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.permutation import permutation


class Sample(NamedTuple):
    """Features of the sampled pairs, batch after batch."""

    images: Tensor  # [N, d_x] float16 or float32
    texts: Tensor  # [N, d_t]
    fold: Tensor  # [N] int16
    sizes: list[int]  # pairs of each batch; batches are consecutive rows
    group: Tensor | None = None  # [N] int64, equal for pairs whose images are copies; None if no two are

    def to(self, device: torch.device) -> "Sample":
        """The same sample, its features on another device: only they are large."""
        return self._replace(images=self.images.to(device), texts=self.texts.to(device))

    def batches(self, repeat: int = 0) -> list[Tensor]:
        """The rows of each batch. Repeat 0 has the batches of the fit; other repeats shuffle all pairs into the same sizes."""
        rows = permutation(len(self.fold), "repeat", repeat) if repeat else torch.arange(len(self.fold))
        return list(rows.split(self.sizes))

    def places(self, repeats: int) -> list[tuple[Tensor, ...]]:
        """For each batch of the sample, its rows in every repeat. Slices are groups of these."""
        return list(zip(*(self.batches(repeat) for repeat in range(repeats)), strict=True))

    def partners(self) -> Tensor:
        """[N] A permutation within each fold: pair n receives the caption of `partners[n]` in a planted swap.

        No pair gets its own caption or that of a copy, unless copies of one image make up more than half of the fold: some of
        them then get captions of their own group. Copies that follow each other get captions that follow each other.
        """
        partner = torch.arange(len(self.fold))
        group = partner if self.group is None else self.group
        for f in self.fold.unique().tolist():
            mine = (self.fold == f).nonzero()[:, 0]
            order = mine[permutation(len(mine), "partners", f)]
            _, member, sizes = group[order].unique(return_inverse=True, return_counts=True)
            first = torch.full_like(sizes, len(order)).scatter_reduce(0, member, torch.arange(len(order)), "amin")
            order = order[first[member].argsort(stable=True)]  # the groups in the order of their first pairs
            partner[order] = order.roll(int(sizes.max()))
        return partner

    def features(self, images: Tensor, texts: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Float32 image features at rows `images` and text features at rows `texts`, on a device."""
        at = self.images.device
        return self.images[images.to(at)].float().to(device), self.texts[texts.to(at)].float().to(device)


def consecutive(batches: list[Tensor]) -> list[Tensor]:
    """For each batch, the positions of its rows in the concatenation of all batches."""
    return list(torch.arange(sum(map(len, batches))).split([len(b) for b in batches]))
