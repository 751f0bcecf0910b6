"""MV-InfoNCE (arXiv 2507.06979): one InfoNCE term an item over any number of views or modalities.

    L = sum_i -log( sum_{a != b} e^S_abii / sum_{(a, i) != (b, j)} e^S_abij )

S [V, V, B, B], S_abij the scaled similarity of view a of item i with view b of item j, so S_abij = S_baji; an embedding's
similarity with itself is left out. As the authors' code has it (github.com/pakoromilas/Multi-View-CL): the denominator holds
the positives, and the negatives within a view. Their loss is the mean L / B.

With M_ij = LSE over (a, b) of S_abij, over a != b on the diagonal, it is InfoNCE over the rows of M, with CLIP's closed forms.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import jvp, vjp

from ecif.losses.contract import Loss
from ecif.losses.contrastive import removed_from_rows, removed_from_rows_derivative


@dataclass(frozen=True)
class MvInfoNCE(Loss, name="mv_infonce"):
    """InfoNCE over any number of views or modalities (arXiv 2507.06979).

    L is concave in part, by the positives. The Gauss-Newton matrix is that of InfoNCE in M, with M seen as an output.
    """

    two_tower: ClassVar[bool] = False

    def batch_loss(self, similarity: Tensor) -> Tensor:
        """L."""
        return self.pair_loss(similarity).sum()

    def pair_loss(self, similarity: Tensor) -> Tensor:
        """Pos_n [B] = LSE_j M_nj - M_nn. Their sum is L."""
        merged = _merged(similarity)
        return merged.logsumexp(1) - merged.diagonal()

    def negative_loss(self, similarity: Tensor) -> Tensor:
        """Neg_n [B] = sum_{k != n} -log(1 - P_kn), P the row softmax of M."""
        return removed_from_rows(_merged(similarity), "exact").sum(0)

    def pair_derivatives(self, similarity: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of Pos_n and Neg_n along S'."""
        merged, moved = _merged_jvp(similarity, tangent)
        positive = (merged.softmax(1) * moved).sum(1) - moved.diagonal()
        return positive, removed_from_rows_derivative(merged, moved, "exact").sum(0)

    def gauss_newton_cotangent(self, similarity: Tensor, tangent: Tensor) -> Tensor:
        """J^T (diag(p) - p p^T) J S', J = dM/dS: positive semi-definite; the curvature of M in S is left out."""
        merged, moved = _merged_jvp(similarity, tangent)
        p = merged.softmax(1)
        curved = p * (moved - (p * moved).sum(1, keepdim=True))
        pull_back = vjp(_merged, similarity)[1]
        return pull_back(curved)[0]


def _merged_jvp(similarity: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """M and its change M', each [B, B]."""
    both = jvp(_merged, (similarity,), (tangent,))
    return both[0], both[1]


def _merged(similarity: Tensor) -> Tensor:
    """M [B, B]."""
    views, _, items, _ = similarity.shape
    same_view = torch.eye(views, dtype=torch.bool, device=similarity.device)[:, :, None, None]
    same_item = torch.eye(items, dtype=torch.bool, device=similarity.device)
    return similarity.masked_fill(same_view & same_item, float("-inf")).flatten(0, 1).logsumexp(0)
