"""A bank of the corpus's own pairs, in which other pairs find their neighbours.

Neighbours are found within one modality, among trunk features that are centred on the bank and have unit length. No fit takes
part. A pair never meets the bank's pairs of its own fold, of which it is one itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecif.heads import Heads, embed
from ecif.search import bisect

NEIGHBOURS = 30.0  # perplexity that the median row of the bank has at the chosen sharpness
PROBES = 512  # rows that the median is taken over
LOG2_SHARPNESS, HALVINGS = (-5.0, 10.0), 16  # interval of the bisection, which ends within 2e-4 of the logarithm


class Bank(NamedTuple):
    """M pairs of the corpus."""

    images: Tensor  # [M, d_x] float16, centred, unit length
    texts: Tensor  # [M, d_t] alike
    image_centre: Tensor  # [d_x] float32
    text_centre: Tensor  # [d_t]
    fold: Tensor  # [M]
    cosine: Tensor  # [M] float32 of image and text of each pair, under the checkpoint's heads
    sharpness: Tensor  # [2] float64: s_x of images, s_t of texts

    def to(self, device: torch.device | str) -> "Bank":
        """The same bank on another device."""
        return Bank(*(part.to(device) for part in self))

    def image_cosine(self, images: Tensor) -> Tensor:
        """[N, M] cosine of features [N, d_x], centred as the bank is, with every image of the bank."""
        return normalize(images - self.image_centre, dim=1) @ self.images.to(images.dtype).T

    def text_cosine(self, texts: Tensor) -> Tensor:
        """[N, M] cosine of features [N, d_t], centred as the bank is, with every text of the bank."""
        return normalize(texts - self.text_centre, dim=1) @ self.texts.to(texts.dtype).T

    def same_fold(self, fold: Tensor) -> Tensor:
        """[N, M] bool: which pairs of the bank a pair of fold [N] must not meet."""
        return fold[:, None] == self.fold[None]


def build(images: Tensor, texts: Tensor, fold: Tensor, checkpoint: Heads) -> Bank:
    """Make a bank, and find the sharpness at which a typical image or caption has NEIGHBOURS neighbours in it.

    A small bank has a quarter of its distinct rows as neighbours instead.

    Args:
        images: [M, d_x] float32 features.
        texts: [M, d_t] float32 features.
        fold: [M], the fold of each pair.
        checkpoint: the model's own heads.
    """
    image_centre, text_centre = images.mean(0), texts.mean(0)
    known = [normalize(features, dim=1).half() for features in (images - image_centre, texts - text_centre)]
    sharpness = torch.tensor([_sharpness(side) for side in known], dtype=torch.float64, device=images.device)
    embedded = embed(checkpoint, images, texts)
    cosine = (embedded.u * embedded.v).sum(1)
    return Bank(known[0], known[1], image_centre, text_centre, fold, cosine, sharpness)


def _sharpness(known: Tensor) -> float:
    """The softmax sharpness at which the median row has perplexity NEIGHBOURS, or a quarter of the rows where they are few.

    Computed over distinct rows: exact copies are each other's neighbours at any sharpness and would bias the median.
    """
    distinct = known.unique(dim=0).float()
    probes = torch.arange(0, len(distinct), -(-len(distinct) // PROBES), device=known.device)
    likeness = distinct[probes] @ distinct.T
    likeness.scatter_(1, probes[:, None], -torch.inf)
    wanted = min(NEIGHBOURS, len(distinct) / 4)

    def too_sharp(log2_sharpness: float) -> bool:
        p = (2**log2_sharpness * likeness).softmax(1)
        perplexity = (-torch.special.xlogy(p, p).sum(1)).exp().nanmedian().item()
        return not perplexity > wanted  # so also where there is nobody else, and the perplexity is NaN

    return float(2 ** bisect(too_sharp, *LOG2_SHARPNESS, HALVINGS)[0])
