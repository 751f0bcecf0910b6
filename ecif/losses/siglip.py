"""SigLIP's sigmoid loss (arXiv 2303.15343): every text with every image is a yes-or-no question of its own.

    L = sum_ij softplus(-z_ij S_ij),   S_ij = s <u_i, v_j> + b,   z_ij = 1 if i = j, else -1

This is the paper's pseudocode. open_clip's SigLipLoss is L / B. The bias is part of S: `Heads.logit_bias`.

Item n is a positive in the term of S_nn only. So Pos_n does not depend on the rest of the batch, and it ranks pairs as the
cosine does. The sum of all Pos_n is not L: L = sum_n (Pos_n + Neg_n / 2), because two items share every negative term.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ecif.losses.contract import Loss
from ecif.losses.contrastive import diagonal, off_diagonal


@dataclass(frozen=True)
class SigLip(Loss, name="siglip"):
    """Pairwise sigmoids: every text with every image is a yes-or-no question (arXiv 2303.15343).

    No softmax is shared, so L(B) - L(B without n) is the sum over row n and column n, an exact closed form.
    """

    stacked: ClassVar[bool] = True
    padded: ClassVar[bool] = True
    has_bias: ClassVar[bool] = True

    def batch_loss(self, similarity: Tensor) -> Tensor:
        """L."""
        return softplus(similarity).sum((-2, -1)) - diagonal(similarity).sum(-1)  # softplus(-x) = softplus(x) - x

    def pair_loss(self, similarity: Tensor) -> Tensor:
        """Pos_n [B] = softplus(-S_nn)."""
        return softplus(-diagonal(similarity))

    def negative_loss(self, similarity: Tensor) -> Tensor:
        """Neg_n [B] = sum_{k != n} [softplus(S_nk) + softplus(S_kn)]."""
        return _off_diagonal_sums(softplus(similarity))

    def pair_derivatives(self, similarity: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of Pos_n and Neg_n along S'."""
        positive = -torch.sigmoid(-diagonal(similarity)) * diagonal(tangent)
        return positive, _off_diagonal_sums(torch.sigmoid(similarity) * tangent)

    def cotangent(self, similarity: Tensor) -> Tensor:
        """dL/dS = sigmoid(S) - I."""
        return torch.sigmoid(similarity) - torch.eye(similarity.shape[-1], dtype=similarity.dtype, device=similarity.device)

    def pair_cotangents(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """dPos_n/dS_nn = -sigmoid(-S_nn), and 0 for the rest."""
        return torch.diag(-torch.sigmoid(-similarity.diagonal())), torch.zeros_like(similarity)

    def gauss_newton_cotangent(self, similarity: Tensor, tangent: Tensor) -> Tensor:
        """(d2L/dS2) S' = sigmoid(S) sigmoid(-S) S', entry by entry."""
        return torch.sigmoid(similarity) * torch.sigmoid(-similarity) * tangent


def _off_diagonal_sums(matrix: Tensor) -> Tensor:
    """[..., n]: the sum of row n and column n without the diagonal."""
    rest = off_diagonal(matrix)
    return rest.sum(-2) + rest.sum(-1)
