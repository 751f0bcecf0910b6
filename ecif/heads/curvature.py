"""The Gauss-Newton matrix of a contrastive loss, applied without ever being formed.

    H = sum over batches of J^T (d2L/dS2) J,   J = dS/d(heads)

It is not the empirical Fisher matrix sum g g^T, which ignores that the logits of a batch share their softmaxes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.batching import ENTRIES, Stack, stacks
from ecif.heads import Embedded, Heads, along_each, logits, logits_vjp, tangents, tangents_vjp
from ecif.losses import CLIP, Loss
from ecif.losses.contract import isolate


def gauss_newton_product(heads: Heads, pairs: Embedded, batches: list[Tensor], directions: Tensor, loss: Loss = CLIP) -> Tensor:
    """H directions, summed over batches, without damping. Batches are computed as few large tensors.

    Args:
        heads: the heads at which the curvature is taken.
        pairs: N pairs under these heads.
        batches: rows of each batch. A pair is in one batch at most.
        directions: [n, P].
        loss: the training loss.

    Returns:
        [n, P], loss units per squared parameter unit times direction.
    """
    alone = Embedded(pairs.images, pairs.texts, *(part[None] for part in pairs[2:]))
    several = SeveralHeads.of([heads], alone)
    return gauss_newton_products(several, several.stacks([batches], len(directions), loss), directions[:, None], loss)[:, 0]


class SeveralHeads(NamedTuple):
    """S sets of heads, and the same N pairs under each of them."""

    heads: Heads  # the first set, for the shapes
    scale: Tensor  # [S, 1, 1] logit scales
    bias: Tensor  # [S, 1, 1] logit biases
    pairs: Embedded  # embeddings [S, N, d] and norms [S, N, 1]

    @classmethod
    def of(cls, heads: list[Heads], pairs: Embedded) -> "SeveralHeads":
        """Some sets of heads, and pairs with embeddings [S, N, d] under them."""
        scale, bias = (pairs.v.new_tensor(scalars)[:, None, None] for scalars in zip(*(h[2:4] for h in heads), strict=True))
        return cls(heads[0], scale, bias, pairs)

    def stacks(self, batches: list[list[Tensor]], directions: int, loss: Loss) -> list[Stack]:
        """The batches of each set of heads as few large tensors of rows: pair r under set s is row s N + r, and S N is no pair.

        Args:
            batches: rows of each batch, for each set of heads.
            directions: how many will be multiplied together.
            loss: the training loss.
        """
        (several, pairs), device = self.pairs.u.shape[:2], self.pairs.u.device
        rows = [of_batch + s * pairs for s, of_heads in enumerate(batches) for of_batch in of_heads]
        found = stacks(rows, ENTRIES[device.type] // directions, several * pairs if loss.padded else None)
        return [stack.to(device) for stack in found]


def gauss_newton_products(several: SeveralHeads, batches: list[Stack], directions: Tensor, loss: Loss = CLIP) -> Tensor:
    """`gauss_newton_product` at several sets of heads in one computation.

    Args:
        several: S sets of heads, and the pairs.
        batches: of `SeveralHeads.stacks`.
        directions: [n, S, P], n for each set of heads.
        loss: the training loss.

    Returns:
        [n, S, P].
    """
    heads, pairs = several.heads, several.pairs
    count = pairs.u.shape[1]
    du, dv, shift = along_each(tangents, heads, pairs, directions)
    u, v, du, dv = (_rows(part) for part in (pairs.u, pairs.v, du, dv))
    pull_u, pull_v, pull_shift = torch.zeros_like(du), torch.zeros_like(dv), torch.zeros_like(shift)
    for rows, there in batches:
        owner = rows[:, 0] // count  # the set of heads of each batch
        scale, of_u, of_v = several.scale[owner], u[rows], v[rows]
        similarity = scale * of_u @ of_v.mT + several.bias[owner]
        tangent = scale * (du[:, rows] @ of_v.mT + of_u @ dv[:, rows].mT) + shift[:, owner, None, None]
        cotangent = _each(loss, similarity if there is None else isolate(similarity, ~there), tangent)
        pull_u[:, rows] = scale * cotangent @ of_v
        pull_v[:, rows] = scale * cotangent.mT @ of_u
        mine = (owner[:, None] == torch.arange(len(several.scale), device=owner.device)).to(cotangent)
        pull_shift += cotangent.sum((2, 3)) @ mine  # no atomic additions: their order would not be fixed
    pulls = (part[:, :-1].unflatten(1, pairs.u.shape[:2]) for part in (pull_u, pull_v))
    return along_each(tangents_vjp, heads, pairs, *pulls, pull_shift)


def _rows(of_pairs: Tensor) -> Tensor:
    """[..., S N + 1, d] of [..., S, N, d]: one row for each pair under each set of heads, and one of zeros that is no pair."""
    rows = of_pairs.flatten(-3, -2)
    return torch.cat([rows, torch.zeros_like(rows[..., :1, :])], -2)


def _each(loss: Loss, similarity: Tensor, tangent: Tensor) -> Tensor:
    """The Gauss-Newton cotangents [D, n, B, B] of a stack of batches [n, B, B]."""
    if loss.takes(similarity):
        return loss.gauss_newton_cotangent(similarity, tangent)
    every = [[loss.gauss_newton_cotangent(*of_batch) for of_batch in zip(similarity, along, strict=True)] for along in tangent]
    return torch.stack([torch.stack(along) for along in every])


def loss_gradient(heads: Heads, batches: list[Embedded], loss: Loss = CLIP) -> Tensor:
    """Gradient [P] of the summed batch losses with respect to the heads."""
    total = torch.zeros(heads.size, dtype=heads.image.dtype, device=heads.image.device)
    for batch in batches:
        total += logits_vjp(heads, batch, loss.cotangent(logits(heads, batch)))
    return total
