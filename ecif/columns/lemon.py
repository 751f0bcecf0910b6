"""LEMoN (Zhang et al., arXiv 2407.18941): a pair is bad if its neighbours in one modality are far from it in the other.

    lemon_n = d_mm(x, y) + beta s_n + gamma s_m
    s_n = mean over the k nearest images x_j of  d_text(y, y_j) exp(-tau1 d_image(x, x_j)) exp(-tau2 d_mm(x_j, y_j))
    s_m = mean over the k nearest texts  y_j of  d_image(x, x_j) exp(-tau1 d_text(y, y_j)) exp(-tau2 d_mm(x_j, y_j))

Neighbours are found in the bank, outside the pair's own fold. All distances are 1 - cosine: d_mm between embeddings under the
checkpoint's heads, d_image and d_text between trunk features that are centred on the bank. The parameters are the fixed ones
that the paper proposes for data without labels to tune them on.
"""

import torch
from torch import Tensor

from ecif.columns.bank import Bank
from ecif.columns.contract import HeldOutPairs, PairScore
from ecif.heads import Heads, embed

K, BETA, GAMMA, TAU1, TAU2 = 30, 5.0, 5.0, 0.1, 5.0
CHUNK = 256  # pairs that are compared with the bank at once


class Lemon(PairScore, name="lemon"):
    """Distance of image and caption, plus their distances to the other side of each other's neighbours."""

    good = "low"
    unit = "1"
    says = "Distance of image and caption, plus that of each to the partners of the other's 30 nearest neighbours (LEMoN)."

    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] score of every pair. If the bank has fewer than K pairs of other folds, the mean is over all of them."""
        parts = zip(*(side.split(CHUNK) for side in (pairs.images, pairs.texts, pairs.fold)), strict=True)
        return torch.cat([_lemon(pairs.checkpoint, pairs.bank, *part) for part in parts])


def _lemon(checkpoint: Heads, bank: Bank, images: Tensor, texts: Tensor, fold: Tensor) -> Tensor:
    embedded = embed(checkpoint, images, texts)
    image, text, own = bank.image_cosine(images), bank.text_cosine(texts), bank.same_fold(fold)
    trust = (-TAU2 * (1 - bank.cosine)).exp()
    far_text, far_image = _discrepancy(image, text, own, trust), _discrepancy(text, image, own, trust)
    return 1 - (embedded.u * embedded.v).sum(1) + BETA * far_text + GAMMA * far_image


def _discrepancy(near: Tensor, far: Tensor, own: Tensor, trust: Tensor) -> Tensor:
    """s [n]: mean weighted distance, in one modality, to the nearest neighbours in the other; 0 for a pair without neighbours.

    Args:
        near: [n, M] cosines in the modality in which neighbours are found.
        far: [n, M] cosines in the other modality.
        own: [n, M] bool, the bank's pairs of the pair's own fold, which are left out.
        trust: [M] weight of every pair of the bank.
    """
    cosine, neighbours = near.masked_fill(own, -torch.inf).topk(min(K, near.shape[1]), dim=1)
    met = cosine.isfinite()
    weight = (-TAU1 * (1 - cosine)).exp() * trust[neighbours]
    total = ((1 - far.gather(1, neighbours)) * weight).where(met, 0.0).sum(1)
    return total / met.sum(1).clamp_min(1)
