"""The influence of each pair of a batch on a target: the pair's gradient, projected exactly on a solved direction.

Removing pair n moves the heads by H^-1 (grad Pos_n + grad Neg_n). With q = H^-1 grad L_T, the first-order change of the target
loss is

    influence_n = <grad Pos_n, q> + <grad Neg_n, q>

Both projections are directional derivatives. One tangent pass gives them for the whole batch, so no pair's gradient is formed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.heads import Embedded, Heads, logits, logits_jvp, tangents
from ecif.losses import CLIP, Loss


class PairScores(NamedTuple):
    """Scores of N pairs under one set of heads."""

    positive: Tensor  # [T, N] predicted change of each target's loss if the pair is removed as a positive
    negative: Tensor  # [T, N] the same if it is removed as a negative
    pair_loss: Tensor  # [N] Pos_n, nats
    clip_score: Tensor  # [N] cosine of image and caption


def score(heads: Heads, pairs: Embedded, batches: list[Tensor], directions: Tensor, loss: Loss = CLIP) -> PairScores:
    """Score every pair of `batches` on every direction.

    Args:
        heads: the heads the directions were solved for.
        pairs: all N pairs under these heads.
        batches: index tensors without repeats. A pair in several batches gets the mean over them; a pair in none gets NaN.
        directions: [T, P], q = H^-1 grad L_T of each target.
        loss: what the heads were fitted with; `Clip("taylor")` for the paper's first-order negatives.

    Returns:
        Influence in units of the target's summed loss. Above 0 the pair helps the target, below 0 it harms it.
    """
    moved = [tangents(heads, pairs, direction) for direction in directions]
    sums = pairs.u.new_zeros(2 * len(moved) + 2, len(pairs.u))
    for rows in batches:
        batch = pairs.take(rows)
        similarity = logits(heads, batch)
        parts: list[Tensor] = []
        for du, dv, shift in moved:
            parts += loss.pair_derivatives(similarity, logits_jvp(heads, batch, du[rows], dv[rows], shift))
        sums[:, rows] += torch.stack([*parts, loss.pair_loss(similarity), torch.ones_like(batch.u[:, 0])])
    mean = sums[:-1] / sums[-1]
    return PairScores(mean[0:-1:2], mean[1:-1:2], mean[-1], (pairs.u * pairs.v).sum(1))
