"""Soft-InfoNCE (arXiv 2310.08069): InfoNCE whose negatives count the less, the more relevant they are.

    L = sum_i [log(e^S_ii + sum_{j != i} w_ij e^S_ij) - S_ii]  and the same over columns
    w_ij = (beta - alpha r_ij) / (beta - alpha / (B - 1)),   sum_{j != i} r_ij = 1

Loss and weights are those of the authors' code (github.com/Alex-HaochenLi/Soft-InfoNCE), except for three points. With
alpha = 0 the loss is InfoNCE.

- The authors have one direction (query to code). Here there are two, as in CLIP.
- Their relevance r is a softmax, over the negatives, of similarities from a separate estimator: BM25, SimCSE, or a trained
  model. A loss here is a function of S only, so the trained model is the model itself: r_ij is the softmax over j != i of
  S_ij / temperature.
- They use alpha = beta = 1 and clip weights at 0.1. Here alpha is below beta, so that no weight needs clipping.

Derivatives treat the weights as constants, as the authors' do. A batch from which an item was removed has new weights.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecif.losses import contrastive
from ecif.losses.contract import Loss
from ecif.losses.contrastive import diagonal, off_diagonal
from ecif.registry import option


@dataclass(frozen=True)
class SoftInfoNCE(Loss, name="soft_infonce"):
    """InfoNCE whose negatives count the less, the more relevant they are (arXiv 2310.08069).

    Everything has a closed form, except for the derivative of Neg_n: autograd differentiates the closed form of Neg_n.
    """

    stacked: ClassVar[bool] = True

    alpha: float = option(0.9, "how much a negative's relevance takes off its weight; 0 is InfoNCE; it has to be below beta")
    beta: float = option(1.0, "weight of a negative without relevance, before weights are scaled to a mean of 1")
    temperature: float = option(1.0, "of the softmax over logits that says which negatives are relevant")

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < self.beta and self.temperature > 0):
            raise ValueError(f"{self}: needs 0 <= alpha < beta and temperature > 0")

    def batch_loss(self, similarity: Tensor) -> Tensor:
        """L."""
        return self.pair_loss(similarity).sum(-1)

    def pair_loss(self, similarity: Tensor) -> Tensor:
        """Pos_n [B]: row n and column n as anchors. Their sum is L."""
        rows, columns = self._weighted(similarity), self._weighted(similarity.mT)
        return rows.logsumexp(-1) + columns.logsumexp(-1) - 2 * diagonal(similarity)

    def negative_loss(self, similarity: Tensor) -> Tensor:
        """Neg_n [B]: by how much the log denominators of the other anchors fall, with the weights of the smaller batch."""
        if similarity.shape[-1] < 3:
            return super().negative_loss(similarity)
        return self._removed_from_rows(similarity).sum(-2) + self._removed_from_rows(similarity.mT).sum(-2)

    def cotangent(self, similarity: Tensor) -> Tensor:
        """dL/dS: the softmaxes of the weighted logits, minus I each."""
        rows, columns = self._weighted(similarity), self._weighted(similarity.mT)
        identity = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        return rows.softmax(-1) + columns.softmax(-1).mT - 2 * identity

    def pair_cotangents(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """dPos_n/dS: the softmaxes of the weighted logits, over row n and over column n."""
        return contrastive.softmax_cotangents(self._weighted(similarity).softmax(1), self._weighted(similarity.mT).softmax(1))

    def gauss_newton_cotangent(self, similarity: Tensor, tangent: Tensor) -> Tensor:
        """(d2L/dS2) S' with the weights held: convex, as the log of a sum of exponentials is."""
        rows, columns = self._weighted(similarity).softmax(-1), self._weighted(similarity.mT).softmax(-1)
        return _covariance(rows, tangent) + _covariance(columns, tangent.mT).mT

    def _weighted(self, similarity: Tensor, negatives: Tensor | None = None) -> Tensor:
        """S + log w [B, B], the arguments of every row's softmax: the diagonal, and the entries in `negatives` [B, B]."""
        if similarity.shape[-1] < 2:
            return similarity
        own = torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
        negatives = ~own if negatives is None else negatives
        relevance = self._relevance(similarity, negatives)
        weight = (self.beta - self.alpha * relevance) / (self.beta - self.alpha / negatives.sum(-1, keepdim=True))
        return similarity + weight.where(negatives, own.to(weight)).log()

    def _relevance(self, similarity: Tensor, negatives: Tensor) -> Tensor:
        """r [B, B], a constant to every derivative."""
        return (similarity.detach() / self.temperature).masked_fill(~negatives, float("-inf")).softmax(-1)

    def _removed_from_rows(self, similarity: Tensor) -> Tensor:
        """[k, n]: by how much the log of row k's denominator falls when column n is removed; 0 on the diagonal.

        Without n, the relevance r_kj becomes r_kj / (1 - r_kn). The remaining negatives then contribute the sum of
        (beta - alpha r_kj / (1 - r_kn)) e^S_kj over j, divided by the new mean weight. If n is the largest negative of the row,
        the differences would cancel, so that denominator is computed directly.
        """
        negatives = ~torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
        shift = similarity.detach().amax(-1, keepdim=True)
        exp = (similarity - shift).exp()
        size, relevance = off_diagonal(exp), self._relevance(similarity, negatives)
        top = size.argmax(-1, keepdim=True)
        plain = size.sum(-1, keepdim=True) - size
        weighted = (relevance * size).sum(-1, keepdim=True) - relevance * size
        left = self.beta * plain - self.alpha * weighted / (1 - relevance).scatter(-1, top, 1.0)
        left = left / (self.beta - self.alpha / (similarity.shape[-1] - 2))
        after = shift + (diagonal(exp)[..., None] + left).log()
        at_top = self._weighted(similarity, negatives.expand_as(exp).scatter(-1, top, False)).logsumexp(-1, keepdim=True)
        change = self._weighted(similarity).logsumexp(-1, keepdim=True) - after.scatter(-1, top, at_top)
        return off_diagonal(change)


def _covariance(p: Tensor, tangent: Tensor) -> Tensor:
    """(diag(p) - p p^T) S' of every row."""
    return p * (tangent - (p * tangent).sum(-1, keepdim=True))
