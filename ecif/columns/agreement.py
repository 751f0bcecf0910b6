"""Do an image and its caption have the same neighbours?

Pairs whose images are alike should have captions that are alike. Both sides of a pair name their neighbours in a bank of other
pairs of the corpus, each within its own modality, as in stochastic neighbour embedding (Hinton & Roweis, 2002):

    a_nm = softmax_m(s_x <x_n, x_m>),   b_nm = softmax_m(s_t <t_n, t_m>),   agreement_n = log( M sum_m a_nm b_nm )

the log of how many times likelier than chance both name the same one of the M pairs that are not of the pair's own fold. x and
t are centred on the bank and have unit length. To compare two modalities by their likeness to known pairs is ASIF's idea
(Norelli et al., arXiv 2210.01738). Features are enough: no head, no fit, and nothing that a fit could memorise.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecif.search import bisect

NEIGHBOURS = 30.0  # the perplexity that the median image or caption of the bank has over its neighbours
PROBES = 512  # the median is taken over about this many of the bank's rows
LOG2_SHARPNESS, HALVINGS = (-5.0, 10.0), 16  # bracket of the sharpness; it is found to 2e-4 in its logarithm
CHUNK = 256  # pairs that are compared with the bank at once


class Bank(NamedTuple):
    """Known pairs."""

    images: Tensor  # [M, d_x] float16, centred, unit length
    texts: Tensor  # [M, d_t] alike
    image_centre: Tensor  # [d_x] float32
    text_centre: Tensor  # [d_t]
    fold: Tensor  # [M]
    sharpness: Tensor  # [2] float64: s_x, s_t

    def to(self, device: torch.device | str) -> "Bank":
        """The same bank on another device."""
        return Bank(*(part.to(device) for part in self))

    def agreement(self, images: Tensor, texts: Tensor, fold: Tensor) -> Tensor:
        """[N] float32, nats: 0 is chance, high is good.

        Args:
            images: [N, d_x] features.
            texts: [N, d_t] features.
            fold: [N] of each pair; 0 for a pair whose fold has every pair of the bank.
        """
        parts = zip(images.split(CHUNK), texts.split(CHUNK), fold.split(CHUNK), strict=True)
        return torch.cat([self._agreement(*part) for part in parts])

    def _agreement(self, images: Tensor, texts: Tensor, fold: Tensor) -> Tensor:
        own = fold[:, None] == self.fold[None]
        sharp_x, sharp_t = self.sharpness.tolist()
        by_image = _named(images - self.image_centre, self.images, sharp_x, own)
        by_text = _named(texts - self.text_centre, self.texts, sharp_t, own)
        others = (~own).sum(1)
        return ((by_image + by_text).logsumexp(1) + others.log()).where(others > 0, 0.0)


def build(images: Tensor, texts: Tensor, fold: Tensor) -> Bank:
    """A bank of pairs, so sharp that a typical image or caption has NEIGHBOURS of them, or a quarter where they are few.

    Args:
        images: [M, d_x] float32 features.
        texts: [M, d_t] alike.
        fold: [M] of each pair.
    """
    image_centre, text_centre = images.mean(0), texts.mean(0)
    known = [normalize(features, dim=1).half() for features in (images - image_centre, texts - text_centre)]
    sharpness = torch.tensor([_sharpness(side) for side in known], dtype=torch.float64, device=images.device)
    return Bank(known[0], known[1], image_centre, text_centre, fold, sharpness)


def _named(centred: Tensor, known: Tensor, sharpness: float, own: Tensor) -> Tensor:
    """[N, M] log-probability that each names each pair of the bank as its neighbour."""
    likeness = sharpness * (normalize(centred, dim=1) @ known.float().T)
    return likeness.masked_fill(own, -torch.inf).log_softmax(1)


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
