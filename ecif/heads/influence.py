"""The columns: what each pair of a batch does to a target, by exact projection on a solved direction.

With q = H^-1 grad L_T, removing pair n moves the heads by H^-1 (grad Pos_n + grad Neg_n), and to first order the target loss by

    influence_n = <grad Pos_n, q> + <grad Neg_n, q>

Both projections are directional derivatives: one tangent pass gives them for the whole batch, no per-pair gradient exists.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.heads import Embedded, Heads, logits, logits_jvp, tangents
from ecif.losses import CLIP, Loss


class PairScores(NamedTuple):
    """Scores of N pairs under one set of heads."""

    positive: Tensor  # [T, N] predicted change of each target's loss from removing the pair as a positive
    negative: Tensor  # [T, N] ... and as a negative
    pair_loss: Tensor  # [N] Pos_n, nats
    clip_score: Tensor  # [N] cosine of image and caption


def score(heads: Heads, pairs: Embedded, batches: list[Tensor], directions: Tensor, loss: Loss = CLIP) -> PairScores:
    """Score every pair of `batches` on every direction.

    Args:
        heads: the heads the directions were solved for.
        pairs: all N pairs under these heads.
        batches: index tensors without repeats. A pair in several batches gets the mean over them, in none NaN.
        directions: [T, P], q = H^-1 grad L_T of each target.
        loss: what the heads were fitted with; `Clip("taylor")` for the paper's first-order negatives.

    Returns:
        Influence in loss units of the target's summed loss; the sign says what removing the pair does to it.
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
