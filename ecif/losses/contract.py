"""What a contrastive loss has to say for itself, so that everything else of influence follows.

A loss is a function of the similarity tensor alone: S [B, B] of a batch, row = text, column = image; with V views
S [V, V, B, B], S_abij = similarity of view a of item i with view b of item j. Item n of the batch is row n and column n of the
last two dimensions; deleting it deletes both. A new loss is one file: `batch_loss` and `pair_loss`. The rest has a default by
autograd or by a loop, which closed forms override and are tested against.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.func import grad, jvp


class Loss(ABC):
    """A contrastive loss, sum convention, in nats; all tensors in the dtype and on the device of S.

    An empty batch has loss 0. The loss has to be finite for an item that is alone in its batch.
    """

    @abstractmethod
    def batch_loss(self, similarity: Tensor) -> Tensor:
        """L of one batch, a scalar."""

    @abstractmethod
    def pair_loss(self, similarity: Tensor) -> Tensor:
        """Pos_n [B]: the terms in which item n is the positive."""

    def negative_loss(self, similarity: Tensor) -> Tensor:
        """Neg_n [B]: the rest of what leaves with item n, L(B) - L(B without n) - Pos_n. The default takes B losses."""
        left = torch.stack([self.batch_loss(without(similarity, n)) for n in range(similarity.shape[-1])])
        return self.batch_loss(similarity) - left - self.pair_loss(similarity)

    def pair_derivatives(self, similarity: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives (dPos, dNeg), each [B], of every Pos_n and Neg_n when S moves by `tangent`, of the shape of S."""
        positive = jvp(self.pair_loss, (similarity,), (tangent,))[1]
        return positive, jvp(self.negative_loss, (similarity,), (tangent,))[1]

    def cotangent(self, similarity: Tensor) -> Tensor:
        """dL/dS, of the shape of S."""
        return grad(self.batch_loss)(similarity)

    def gauss_newton_cotangent(self, similarity: Tensor, tangent: Tensor) -> Tensor:
        """(d2L/dS2) S', of the shape of S. A loss that is not convex in S has to leave out what is not."""
        return jvp(self.cotangent, (similarity,), (tangent,))[1]


def without(similarity: Tensor, n: int) -> Tensor:
    """S without item n."""
    size = similarity.shape[-1]
    kept = torch.tensor([i for i in range(size) if i != n], dtype=torch.long, device=similarity.device)
    return similarity.index_select(-2, kept).index_select(-1, kept)
