"""Decoupled contrastive loss (DCL, arXiv 2110.06848): InfoNCE whose denominator leaves the positive out.

    L = sum_i [LSE_{j != i} S_ij - S_ii] + sum_j [LSE_{i != j} S_ij - S_jj]

This is the paper's unweighted form, for two towers. The paper's negatives within a view have no counterpart in S [B, B] and are
left out. For a pair alone in its batch the formula gives log 0; its loss is 0 here, as InfoNCE's is.

Let M be S with minus infinity on the diagonal. Every formula is that of CLIP (`ecif.losses.contrastive`) with M in the softmax.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecif.losses import contrastive
from ecif.losses.contract import Loss
from ecif.losses.contrastive import diagonal


@dataclass(frozen=True)
class Dcl(Loss, name="dcl"):
    """InfoNCE whose denominators leave the positive out (decoupled contrastive loss, arXiv 2110.06848).

    Its closed forms are those of CLIP. A batch of two uses the contract's defaults, because a deletion leaves one pair alone.
    """

    stacked: ClassVar[bool] = True

    def batch_loss(self, similarity: Tensor) -> Tensor:
        """L."""
        return self.pair_loss(similarity).sum(-1)

    def pair_loss(self, similarity: Tensor) -> Tensor:
        """Pos_n [B] = LSE_{j != n} S_nj + LSE_{i != n} S_in - 2 S_nn. Their sum is L."""
        if similarity.shape[-1] < 2:
            return 0 * diagonal(similarity)
        masked = _masked(similarity)
        return masked.logsumexp(-1) + masked.logsumexp(-2) - 2 * diagonal(similarity)

    def negative_loss(self, similarity: Tensor) -> Tensor:
        """Neg_n [B] = sum_{k != n} [-log(1 - P_kn) - log(1 - Q_nk)], P and Q the softmaxes of M."""
        if similarity.shape[-1] < 3:
            return super().negative_loss(similarity)
        return contrastive.negative_loss(_masked(similarity))

    def pair_derivatives(self, similarity: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of Pos_n and Neg_n along S'."""
        if similarity.shape[-1] < 3:
            return super().pair_derivatives(similarity, tangent)
        return contrastive.pair_derivatives(_masked(similarity), tangent)

    def cotangent(self, similarity: Tensor) -> Tensor:
        """dL/dS = (P - I) + (Q - I)."""
        return torch.zeros_like(similarity) if similarity.shape[-1] < 2 else contrastive.loss_cotangent(_masked(similarity))

    def pair_cotangents(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """dPos_n/dS: those of CLIP with the softmaxes of M, which leave S_nn out."""
        if similarity.shape[-1] < 2:
            return torch.zeros_like(similarity), torch.zeros_like(similarity)
        return contrastive.pair_cotangents(_masked(similarity))

    def gauss_newton_cotangent(self, similarity: Tensor, tangent: Tensor) -> Tensor:
        """(d2L/dS2) S'."""
        if similarity.shape[-1] < 2:
            return torch.zeros_like(similarity)
        return contrastive.gauss_newton_cotangent(_masked(similarity), tangent)


def _masked(similarity: Tensor) -> Tensor:
    """M [..., B, B]: S with minus infinity on the diagonal."""
    return similarity.masked_fill(torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device), float("-inf"))
