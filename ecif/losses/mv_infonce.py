"""MV-InfoNCE (arXiv 2507.06979): one InfoNCE term for each item, over any number of views or modalities.

    L = sum_i -log( sum_{a != b} e^S_abii / sum_{(a, i) != (b, j)} e^S_abij )

S [V, V, B, B] holds the scaled similarities: S_abij is that of view a of item i with view b of item j, so S_abij = S_baji. An
embedding's similarity with itself is left out. The denominator is that of the authors' code
(github.com/pakoromilas/Multi-View-CL). It includes the positives, and the negatives within a view. Their loss is the mean
L / B.

Let M_ij be the LSE of S_abij over (a, b), and on the diagonal over a != b only. The loss is InfoNCE over the rows of M, with
the closed forms of CLIP's.

The loss is for models with several views or modalities, and for use from Python. `ecif run` has two towers and does not offer
it. Take the unit embeddings z [V, B, d] of a batch, and their derivative dz along a direction q = H^-1 grad L_T of your model
(one JVP):

    similarity = s * torch.einsum("aid,bjd->abij", z, z)
    tangent = s * (torch.einsum("aid,bjd->abij", dz, z) + torch.einsum("aid,bjd->abij", z, dz))
    positive, negative = MvInfoNCE().pair_derivatives(similarity, tangent)  # [B] each: the influence of every item of the batch

q is solved with `ecif.solve` on Gauss-Newton products. Each product is the pull-back of `gauss_newton_cotangent` through the
model.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import jvp, vjp

from ecif.losses.contract import Loss
from ecif.losses.contrastive import removed, removed_derivative


@dataclass(frozen=True)
class MvInfoNCE(Loss, name="mv_infonce"):
    """InfoNCE over any number of views or modalities (arXiv 2507.06979): of a batch of B items with V views.

    The positives make L concave in part. The Gauss-Newton matrix is therefore that of InfoNCE in M, as if M were the output.
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
        return removed(_merged(similarity), "exact", -1)

    def pair_derivatives(self, similarity: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of Pos_n and Neg_n along S'."""
        merged, moved = _merged_jvp(similarity, tangent)
        mean, negative = removed_derivative(merged, moved, "exact", -1)
        return mean - moved.diagonal(), negative

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
    """M [B, B], the LSE of S_abij over the views (a, b)."""
    views, _, items, _ = similarity.shape
    same_view = torch.eye(views, dtype=torch.bool, device=similarity.device)[:, :, None, None]
    same_item = torch.eye(items, dtype=torch.bool, device=similarity.device)
    return similarity.masked_fill(same_view & same_item, float("-inf")).flatten(0, 1).logsumexp(0)
