"""Copies and near-copies of images: they share a fold, so that no pair is scored by heads or neighbours that know its copy.

Two images of the sample are near-copies if the cosine of their features is above NEAR, after the features were centred on the
sample's mean. Connected components of this relation are groups (`ecif.components`). A group is in one fold, by a hash of its
least uid, so the order of the rows does not matter. A pair outside of the sample takes the fold of its nearest sampled pair if
that is a near-copy, else that of its own uid's hash. So a shard's folds are a function of the shard, the sample and the
configuration, and no pass over the corpus is needed. Copies of which none is in the sample need nothing: no head has seen
them.

**Exactness.** Centred unit features are rounded to multiples of 2^-11. Then every product and every partial sum of a cosine is
a multiple of 2^-22 below 2, which float32 holds exactly. So cosines do not depend on the order of summation, on chunks, threads
or the device. The rounding moves a cosine by about 2e-4.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.batching import folds
from ecif.columns.contract import Column
from ecif.components import connected

NEAR = 0.9  # cosine above which two images, or two captions, are near-copies
CUTS = (
    0.95,
    0.98,
    0.999,
)  # thresholds at which a group that is too large is cut again; above the last, images are exact copies
STEPS = 2.0**11  # features are rounded to multiples of 1 / STEPS
FLOOR = 2.0**-5  # features nearer to the mean than this have no direction of their own; half precision rounds by some 2^-11
CHUNK, KNOWN = 1024, 4096  # pairs, and sampled pairs, that are compared at once

COPIES = (
    Column("image_copies", "low", "pairs", "Number of other sampled pairs whose image is a near-copy of the pair's image."),
    Column("caption_copies", "low", "pairs", "Number of other sampled pairs whose caption says nearly the same."),
)


class OfPairs(NamedTuple):
    """What a sample says about copies of N pairs."""

    fold: Tensor  # [N] int16
    image_copies: Tensor  # [N] float32, the sampled pairs whose image is a near-copy, without the pair itself
    caption_copies: Tensor  # [N] float32, the same of the caption


class Copies(NamedTuple):
    """The N sampled pairs and their groups: what decides the fold of every pair of a corpus."""

    images: Tensor  # [N, d_x + 1] float16, see `directions`
    texts: Tensor  # [N, d_t + 1] float16
    image_centre: Tensor  # [d_x] float64, mean of the features
    text_centre: Tensor  # [d_t] float64
    pair: Tensor  # [N] int64, see `pair_ids`
    group: Tensor  # [N] int64, the least row of each pair's group
    fold: Tensor  # [N] int16
    folds: int  # K
    seed: int  # of the hash

    def to(self, device: torch.device | str) -> "Copies":
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in self._fields if name not in ("folds", "seed")}
        return Copies(**moved, folds=self.folds, seed=self.seed)

    def check(self) -> None:
        """Raise ValueError if there are too few images that are not copies of each other for the folds."""
        pairs, groups, largest = len(self.group), len(self.group.unique()), int(torch.bincount(self.fold.long()).max())
        if groups < self.folds:
            raise ValueError(
                f"the images of the {pairs} sampled pairs are copies of {groups}: {self.folds} folds need at least "
                f"{self.folds} different images"
            )
        if pairs - largest < 2:
            raise ValueError(f"{largest} of {pairs} sampled pairs are in one fold: too many of their images are copies")

    def of(self, images: Tensor, texts: Tensor, uids: list[str], pair: Tensor) -> OfPairs:
        """The fold of each of N pairs, and how many copies of its image and of its caption are in the sample.

        Args:
            images: [N, d_x] features, on the device of the sample.
            texts: [N, d_t] features.
            uids: of the pairs.
            pair: [N] their identities. A pair of the sample keeps its fold, and does not count as its own copy.
        """
        own = folds(uids, self.folds, self.seed).to(images.device)
        known, order = self.pair.sort()
        at = torch.searchsorted(known, pair).clamp_max(len(known) - 1)
        sampled = known[at] == pair
        image_copies, fold = self._near(directions(images, self.image_centre), self.images)
        caption_copies, _ = self._near(directions(texts, self.text_centre), self.texts)
        fold = torch.where(sampled, self.fold[order[at]], torch.where(fold >= 0, fold, own))
        return OfPairs(fold, image_copies - sampled.float(), caption_copies - sampled.float())

    def _near(self, units: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """For each pair, the number [N] of near-copies in the sample, and the fold [N] of the nearest; -1 if there are none.

        Of several that are equally near, the least fold is taken.
        """
        count = torch.zeros(len(units), device=units.device)
        best, fold = torch.full_like(count, NEAR), torch.full((len(units),), -1, dtype=torch.int16, device=units.device)
        for known, of_known in zip(sampled.split(KNOWN), self.fold.split(KNOWN), strict=True):
            known = known.float().T
            for rows in torch.arange(len(units), device=units.device).split(CHUNK):
                cosine = units[rows].float() @ known
                nearest = cosine.amax(1)
                least = torch.where(cosine == nearest[:, None], of_known, self.folds).amin(1).to(torch.int16)
                tied = (nearest == best[rows]) & (fold[rows] >= 0)
                least = torch.where(tied, least.minimum(fold[rows]), least)
                fold[rows] = torch.where(tied | (nearest > best[rows]), least, fold[rows])
                best[rows] = best[rows].maximum(nearest)
                count[rows] += (cosine > NEAR).sum(1)
        return count, fold


def find_copies(images: Tensor, texts: Tensor, uids: list[str], pair: Tensor, count: int, seed: int) -> Copies:
    """Group the copies of a sample, and give every group a fold.

    Args:
        images: [N, d_x] features of the sampled pairs, on the device to compute on.
        texts: [N, d_t] features.
        uids: of the pairs.
        pair: [N] int64, see `pair_ids`.
        count: K, the number of folds.
        seed: of the hash that chooses the fold of a group.

    Returns:
        The groups. They may be too few for the folds, see `Copies.check`.
    """
    image_centre, text_centre = (side.double().mean(0) for side in (images, texts))
    units = directions(images, image_centre)
    group = group_copies(units, count)
    fold = fold_of_groups(group, uids, count, seed)
    return Copies(units, directions(texts, text_centre), image_centre, text_centre, pair, group, fold, count, seed)


def group_copies(units: Tensor, count: int) -> Tensor:
    """Groups [N] of near-copies, each named by its least row.

    Single linkage follows chains: in a poor corpus it can join a large part of all images. A group of more than half a fold
    would make one fold much larger than the others, and leave little to fit the heads on that score it. Such a group is cut
    again at the next threshold of CUTS. Exact copies always stay together.

    Args:
        units: [N, d + 1] directions of images.
        count: K, the number of folds.
    """
    group = connected(units, NEAR)
    for threshold in CUTS:
        large = torch.bincount(group, minlength=len(group))[group] > len(group) / (2 * count)
        rows = large.nonzero()[:, 0]
        if len(rows):
            group[rows] = rows[connected(units[rows], threshold)]
    return group


def fold_of_groups(group: Tensor, uids: list[str], count: int, seed: int) -> Tensor:
    """Fold [N] int16 of each pair: that of the least uid of its group.

    Args:
        group: [N] int64.
        uids: of the pairs.
        count: number of folds.
        seed: of the hash.
    """
    ordered = sorted(set(uids))
    place = {uid: i for i, uid in enumerate(ordered)}
    places = torch.tensor([place[uid] for uid in uids], device=group.device)
    names, member = group.unique(return_inverse=True)
    least = torch.full_like(names, len(ordered)).scatter_reduce(0, member, places, "amin")
    return folds([ordered[i] for i in least.tolist()], count, seed).to(group.device)[member]


def directions(features: Tensor, centre: Tensor) -> Tensor:
    """Centred unit features [N, d + 1] float16, rounded to multiples of 1 / STEPS.

    The last coordinate is 0, but for features within FLOOR of the centre. Those have no direction, only rounding errors: they
    are shrunk and the last coordinate makes up for it, so all of them are alike. Where every image is the same, all are there.

    Args:
        features: [N, d].
        centre: [d] float64.
    """
    parts = []
    for part in features.split(KNOWN):
        moved = part.double() - centre
        unit = moved / moved.norm(dim=1, keepdim=True).clamp_min(FLOOR)
        rest = (1 - unit.square().sum(1, keepdim=True)).clamp_min(0).sqrt()
        parts.append(((torch.cat([unit, rest], 1) * STEPS).round() / STEPS).half())
    return torch.cat(parts)


def alike(first: Tensor, second: Tensor) -> Tensor:
    """[N] bool: whether directions [N, d + 1] and those of the same rows [N, d + 1] are of near-copies."""
    return (first.float() * second.float()).sum(1) > NEAR


def pair_ids(shard: str, index: Tensor) -> Tensor:
    """[N] int64: identities of pairs of a shard, a hash of its name plus their positions in it (int, [N])."""
    digest = hashlib.blake2b(shard.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return index.long() + int.from_bytes(digest, "little", signed=True) // 2  # halved, so that no sum overflows
