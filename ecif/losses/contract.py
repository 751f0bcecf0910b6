"""The contract of a contrastive loss: the methods that influence is computed with.

A loss is a function of the similarity tensor only: S [B, B] of a batch, row = text, column = image. With V views it is
S [V, V, B, B], and S_abij is the similarity of view a of item i with view b of item j. Item n of the batch is row n and column
n of the last two dimensions. Deleting the item deletes both.

A new loss is one class with `batch_loss` and `pair_loss`. All other methods have defaults by autograd or by a loop. Closed
forms override the defaults and are tested against them.

    class Focal(Loss, name="focal"): ...

registers a loss. Its options are its dataclass fields, see `ecif.registry.option`.
"""

from abc import ABC, abstractmethod
from dataclasses import Field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from ecif.registry import Kind

ALONE = 1e4  # similarity of an isolated item to itself: its softmaxes and its sigmoid are 1 there
ENTRIES = 2**24  # derivatives that the default of `pair_cotangents` holds at once; a pair has B x B


class Loss(Kind, ABC):
    """A contrastive loss, sum convention, in nats; all tensors in the dtype and on the device of S.

    An empty batch has loss 0. The loss has to be finite for an item that is alone in its batch.

    Attributes:
        two_tower: S is [B, B], texts against images, as in a run. It is False for a loss over several views.
        stacked: all methods but `pair_cotangents` also take a stack of batches of one size, S [..., B, B], and treat each
            batch by itself. A batch of one or two items always comes alone.
        padded: an item that `isolate` has set apart adds nothing to any derivative of the loss, so that batches of different
            sizes share a stack. Only for a loss that is `stacked`.
        has_bias: a number added to all logits changes the loss, so the fit has to find that bias. A softmax is invariant to it.
        has_taylor: the field `negative` chooses between the exact Neg_n and ECIF's first-order form of it.
        closed_curvature: `ecif.projected` has closed forms of the loss's gradients and curvature. The index and second order
            need them.
        in_forward_mode: forward mode can fit and solve with the loss.
    """

    two_tower: ClassVar[bool] = True
    stacked: ClassVar[bool] = False
    padded: ClassVar[bool] = False
    has_bias: ClassVar[bool] = False
    has_taylor: ClassVar[bool] = False
    closed_curvature: ClassVar[bool] = False
    in_forward_mode: ClassVar[bool] = False

    @classmethod
    def options(cls) -> list[Field[Any]]:
        """All dataclass fields but `negative`, which is no option of the training: scores depend on it, fits do not."""
        return [option for option in super().options() if option.name != "negative"]

    def takes(self, stack: Tensor) -> bool:
        """Whether the methods take this stack of batches [n, B, B] as a whole; otherwise each batch comes alone."""
        return self.stacked and stack.shape[-1] > 2

    @abstractmethod
    def batch_loss(self, similarity: Tensor) -> Tensor:
        """L of one batch, a scalar."""

    @abstractmethod
    def pair_loss(self, similarity: Tensor) -> Tensor:
        """Pos_n [B]: the terms in which item n is the positive."""

    def negative_loss(self, similarity: Tensor) -> Tensor:
        """Neg_n [B] = L(B) - L(B without n) - Pos_n: the other terms that leave with item n. The default computes B losses."""
        left = torch.stack([self.batch_loss(without(similarity, n)) for n in range(similarity.shape[-1])])
        return self.batch_loss(similarity) - left - self.pair_loss(similarity)

    def pair_derivatives(self, similarity: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives (dPos, dNeg), each [B], of every Pos_n and Neg_n along `tangent`, which has the shape of S.

        If the loss is `stacked`, a tangent may have more leading dimensions than S.
        """
        similarity = similarity.expand_as(tangent).contiguous()
        positive = jvp(self.pair_loss, (similarity,), (tangent,))[1]
        return positive, jvp(self.negative_loss, (similarity,), (tangent,))[1]

    def cotangent(self, similarity: Tensor) -> Tensor:
        """dL/dS, of the shape of S."""
        return grad(self.batch_loss)(similarity)

    def pair_cotangents(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """Derivative of every Pos_n with respect to S [B, B], for a loss whose Pos_n depends on row n and column n of S only.

        Returns:
            (rows, columns), each [B, B]: rows_nj = dPos_n / dS_nj and columns_ni = dPos_n / dS_in. The derivative with respect
            to S_nn is in `rows`; columns_nn is 0.
        """
        pull_back = vjp(self.pair_loss, similarity)[1]
        rows, columns = torch.zeros_like(similarity), torch.zeros_like(similarity)
        for one in torch.arange(len(similarity), device=similarity.device).split(max(1, ENTRIES // max(1, similarity.numel()))):
            basis = torch.zeros_like(similarity[one]).scatter_(1, one[:, None], 1.0)
            (each,) = vmap(pull_back)(basis)
            at = torch.arange(len(one), device=one.device)
            rows[one], columns[one] = each[at, one], each[at, :, one]
        return rows, columns.fill_diagonal_(0.0)

    def gauss_newton_cotangent(self, similarity: Tensor, tangent: Tensor) -> Tensor:
        """(d2L/dS2) S', of the shape of S. A loss that is not convex in S has to leave out the part that is not."""
        return jvp(self.cotangent, (similarity,), (tangent,))[1]


def without(similarity: Tensor, n: int) -> Tensor:
    """S without item n."""
    size = similarity.shape[-1]
    kept = torch.tensor([i for i in range(size) if i != n], dtype=torch.long, device=similarity.device)
    return similarity.index_select(-2, kept).index_select(-1, kept)


def isolate(similarity: Tensor, items: Tensor) -> Tensor:
    """S [..., B, B] in which some items [..., B] (bool) are minus infinity from all others, and ALONE from themselves."""
    apart = similarity.masked_fill(items[..., :, None] | items[..., None, :], float("-inf"))
    return apart.masked_fill(torch.diag_embed(items), ALONE)
