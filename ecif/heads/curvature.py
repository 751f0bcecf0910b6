"""The Gauss-Newton matrix of a contrastive loss, applied without ever being formed.

    H = sum over batches of J^T (d2L/dS2) J,   J = dS/d(heads)

It is not the empirical Fisher matrix sum g g^T, which ignores that the logits of a batch share their softmaxes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ecif.heads import Embedded, Heads, logits, logits_jvp, logits_vjp, tangents
from ecif.losses import CLIP, Loss


def gauss_newton_product(heads: Heads, batches: Iterable[Embedded], directions: Tensor, loss: Loss = CLIP) -> Tensor:
    """H directions, summed over `batches` in their order, without damping.

    Args:
        heads: the heads at which the curvature is taken.
        batches: batches embedded with these heads.
        directions: [n, P].
        loss: the training loss.

    Returns:
        [n, P], loss units per squared parameter unit times direction.
    """
    total = torch.zeros_like(directions)
    for batch in batches:
        similarity = logits(heads, batch)
        for out, direction in zip(total, directions, strict=True):
            tangent = logits_jvp(heads, batch, *tangents(heads, batch, direction))
            out += logits_vjp(heads, batch, loss.gauss_newton_cotangent(similarity, tangent))
    return total


def loss_gradient(heads: Heads, batches: list[Embedded], loss: Loss = CLIP) -> Tensor:
    """Gradient [P] of the summed batch losses with respect to the heads."""
    total = torch.zeros(heads.size, dtype=heads.image.dtype, device=heads.image.device)
    for batch in batches:
        total += logits_vjp(heads, batch, loss.cotangent(logits(heads, batch)))
    return total
