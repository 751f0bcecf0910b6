"""CLIP's symmetric InfoNCE (arXiv 2103.00020): sum_i [LSE_j S_ij - S_ii] + sum_j [LSE_i S_ij - S_jj]."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ecif.losses import contrastive
from ecif.losses.contract import Loss
from ecif.losses.contrastive import Negative


@dataclass(frozen=True)
class Clip(Loss, name="clip"):
    """CLIP's symmetric InfoNCE: a softmax over every row and every column (arXiv 2103.00020).

    It has the closed forms of `ecif.losses.contrastive`. open_clip's ClipLoss is L / 2B.
    """

    stacked: ClassVar[bool] = True
    padded: ClassVar[bool] = True
    has_taylor: ClassVar[bool] = True
    closed_curvature: ClassVar[bool] = True
    in_forward_mode: ClassVar[bool] = True

    negative: Negative = "exact"  # -log(1 - P), or ECIF's first-order (Taylor) form P

    def batch_loss(self, similarity: Tensor) -> Tensor:
        """L."""
        return contrastive.batch_loss(similarity)

    def pair_loss(self, similarity: Tensor) -> Tensor:
        """Pos_n [B] = LSE_j S_nj + LSE_i S_in - 2 S_nn."""
        return contrastive.pair_loss(similarity)

    def negative_loss(self, similarity: Tensor) -> Tensor:
        """Neg_n [B], exact or Taylor."""
        return contrastive.negative_loss(similarity, self.negative)

    def pair_derivatives(self, similarity: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of Pos_n and Neg_n along S'."""
        return contrastive.pair_derivatives(similarity, tangent, self.negative)

    def cotangent(self, similarity: Tensor) -> Tensor:
        """dL/dS."""
        return contrastive.loss_cotangent(similarity)

    def pair_cotangents(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """dPos_n/dS: P and the transpose of Q, with P_nn + Q_nn - 2 for S_nn."""
        return contrastive.pair_cotangents(similarity)

    def gauss_newton_cotangent(self, similarity: Tensor, tangent: Tensor) -> Tensor:
        """(d2L/dS2) S'."""
        return contrastive.gauss_newton_cotangent(similarity, tangent)
