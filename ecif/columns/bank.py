"""A bank: pairs of the corpus, or of a target, among which every pair's nearest neighbours are found.

Neighbours are compared within one modality, by the cosine of trunk features that are centred on the bank's mean. Fitted heads
play no part. A pair is not compared with the bank's pairs of its own fold: the pair itself and its copies may be among them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecif.heads import Heads, embed
from ecif.search import bisect

NEIGHBOURS = 30.0  # perplexity of the median row at the chosen sharpness
PROBES = 512  # the median is taken over at most this many rows
ROWS = 32  # whose neighbours are weighed at once: few enough for a core's cache
LOG2_SHARPNESS, HALVINGS = (-5.0, 10.0), 16  # the bisection's interval and steps; log2 of the sharpness is exact to 2.3e-4


class Bank(NamedTuple):
    """M pairs."""

    images: Tensor  # [M, d_x] float16, centred, unit length
    texts: Tensor  # [M, d_t] float16, centred, unit length
    image_centre: Tensor  # [d_x] float32, mean of the features before centring
    text_centre: Tensor  # [d_t] float32
    fold: Tensor  # [M] fold of each pair
    cosine: Tensor  # [M] float32, cosine of image and text of each pair under the heads that the bank was built with
    sharpness: Tensor  # [2] float64, softmax sharpness: s_x of images, s_t of texts

    def to(self, device: torch.device | str) -> "Bank":
        """The same bank on another device."""
        return Bank(*(part.to(device) for part in self))

    def among(self, chosen: Tensor) -> "Bank":
        """Some pairs of the bank [M] bool, their features in float32: for many comparisons. Centre and sharpness stay."""
        images, texts = (side[chosen].float() for side in (self.images, self.texts))
        return self._replace(images=images, texts=texts, fold=self.fold[chosen], cosine=self.cosine[chosen])

    def image_cosine(self, images: Tensor) -> Tensor:
        """[N, M] cosine of image features [N, d_x] with every image of the bank, after centring them as the bank is."""
        return normalize(images - self.image_centre, dim=1) @ self.images.to(images.dtype).T

    def text_cosine(self, texts: Tensor) -> Tensor:
        """[N, M] cosine of text features [N, d_t] with every text of the bank, after centring them as the bank is."""
        return normalize(texts - self.text_centre, dim=1) @ self.texts.to(texts.dtype).T

    def same_fold(self, fold: Tensor) -> Tensor:
        """[N, M] bool: which pairs of the bank are in the fold of each of N pairs, and so are not its neighbours."""
        return fold[:, None] == self.fold[None]


def build_bank(images: Tensor, texts: Tensor, fold: Tensor, heads: Heads) -> Bank:
    """Make a bank, and choose the sharpness of each modality so that the median row has about NEIGHBOURS neighbours.

    In a small bank, a quarter of the distinct rows are neighbours instead.

    Args:
        images: [M, d_x] float32 features.
        texts: [M, d_t] float32 features.
        fold: [M] fold of each pair.
        heads: for the cosines; for a bank of the corpus the model's own.
    """
    image_centre, text_centre = images.mean(0), texts.mean(0)
    known = [normalize(features, dim=1).half() for features in (images - image_centre, texts - text_centre)]
    sharpness = torch.tensor([_sharpness(side) for side in known], dtype=torch.float64, device=images.device)
    embedded = embed(heads, images, texts)
    cosine = (embedded.u * embedded.v).sum(1)
    return Bank(known[0], known[1], image_centre, text_centre, fold, cosine, sharpness)


def _sharpness(known: Tensor) -> float:
    """The softmax sharpness at which the median row has perplexity NEIGHBOURS, or a quarter of the rows if that is less.

    Computed over distinct rows: exact copies are each other's neighbours at any sharpness and would bias the median.
    """
    distinct = known.unique(dim=0).float()
    if len(distinct) == 1:
        return float(2 ** LOG2_SHARPNESS[0])
    probes = torch.arange(0, len(distinct), -(-len(distinct) // PROBES), device=known.device)
    itself = torch.zeros(len(probes), len(distinct), dtype=torch.bool, device=known.device).scatter_(1, probes[:, None], True)
    likeness = (distinct[probes] @ distinct.T)[~itself].view(len(probes), -1)
    wanted = min(NEIGHBOURS, len(distinct) / 4)

    def too_sharp(log2_sharpness: float) -> bool:
        some = (_perplexity(2**log2_sharpness * rows) for rows in likeness.split(ROWS))
        return torch.cat(list(some)).nanmedian().item() <= wanted

    return float(2 ** bisect(too_sharp, *LOG2_SHARPNESS, HALVINGS)[0])


def _perplexity(exponents: Tensor) -> Tensor:
    """exp(entropy) [N] of the softmax of each row of exponents [N, M]."""
    log_p = exponents.log_softmax(1).clamp(min=-80.0)  # smaller numbers are denormal, and many times slower
    return (-(log_p.exp() * log_p).sum(1)).exp()
