"""The Gauss-Newton matrix of a contrastive loss, applied without ever being formed.

    H = sum over batches of J^T (d2L/dS2) J,   J = dS/d(heads)

It is not the empirical Fisher matrix sum g g^T, which ignores that the logits of a batch share their softmaxes.
"""

import torch
from torch import Tensor

from ecif.batching import ENTRIES, stacks
from ecif.heads import Embedded, Heads, logits, logits_vjp, tangents, tangents_vjp
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
    u, v = _with_filler(pairs.u), _with_filler(pairs.v)
    moves = zip(*(tangents(heads, pairs, direction) for direction in directions), strict=True)
    du, dv, shift = (torch.stack(of_directions) for of_directions in moves)
    du, dv = _with_filler(du), _with_filler(dv)
    pull_u, pull_v, pull_shift = torch.zeros_like(du), torch.zeros_like(dv), torch.zeros_like(shift)
    filler = len(pairs.u) if loss.padded else None
    for stack in stacks(batches, ENTRIES[u.device.type] // len(directions), filler):
        rows, there = stack.to(u.device)
        of_u, of_v = u[rows], v[rows]
        similarity = heads.logit_scale * of_u @ of_v.mT + heads.logit_bias
        tangent = heads.logit_scale * (du[:, rows] @ of_v.mT + of_u @ dv[:, rows].mT) + shift[:, None, None, None]
        cotangent = _each(loss, similarity if there is None else isolate(similarity, ~there), tangent)
        pull_u[:, rows] = heads.logit_scale * cotangent @ of_v
        pull_v[:, rows] = heads.logit_scale * cotangent.mT @ of_u
        pull_shift += cotangent.sum((1, 2, 3))
    pulls = zip(pull_u[:, :-1], pull_v[:, :-1], pull_shift, strict=True)
    return torch.stack([tangents_vjp(heads, pairs, *pull) for pull in pulls])


def _with_filler(rows: Tensor) -> Tensor:
    """[..., N + 1, d]: rows of pairs, and a row of zeros for the places of a stack that no pair fills."""
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
