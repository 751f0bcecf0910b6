"""The influence of each pair of a batch on a target: the pair's gradient, projected exactly on a solved direction.

Removing pair n moves the heads by H^-1 (grad Pos_n + grad Neg_n). With q = H^-1 grad L_T, the first-order change of the target
loss is

    influence_n = <grad Pos_n, q> + <grad Neg_n, q>

Both projections are directional derivatives. One tangent pass gives them for a whole batch, so no pair's gradient is formed.
Batches of one size are computed together, and all directions share a batch's softmaxes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.batching import ENTRIES, mean_by_pair, stacks
from ecif.heads import Embedded, Heads, along_each, logits, logits_jvp, tangents
from ecif.losses import CLIP, Loss


class PairScores(NamedTuple):
    """The influence of N pairs on T targets under one set of heads."""

    positive: Tensor  # [T, N] predicted change of each target's loss if the pair is removed as a positive
    negative: Tensor  # [T, N] the same if it is removed as a negative


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
    du, dv, shift = along_each(tangents, heads, pairs, directions)
    rows = [stack.rows.to(du.device) for stack in stacks(batches, ENTRIES[du.device.type] // len(directions))]
    values = [_derivatives(heads, pairs.take(r), du[:, r], dv[:, r], shift, loss) for r in rows]
    everyone = torch.cat([r.flatten() for r in rows])
    return PairScores(*mean_by_pair(everyone, torch.cat(values, -1), len(pairs.u)))


def pair_losses(heads: Heads, pairs: Embedded, batches: list[Tensor], loss: Loss = CLIP) -> Tensor:
    """Pos_n [N] in nats; batches are those of `score`."""
    rows = [stack.rows.to(pairs.u.device) for stack in stacks(batches, ENTRIES[pairs.u.device.type])]
    values = [_pair_losses(logits(heads, pairs.take(r)), loss).flatten() for r in rows]
    return mean_by_pair(torch.cat([r.flatten() for r in rows]), torch.cat(values), len(pairs.u))


def _derivatives(heads: Heads, batches: Embedded, du: Tensor, dv: Tensor, shift: Tensor, loss: Loss) -> Tensor:
    """[2, T, n B] both parts of the influence of the pairs of a stack of n batches."""
    tangent = logits_jvp(heads, batches, du, dv, shift[:, None, None, None])
    similarity = logits(heads, batches)
    if not loss.takes(similarity):
        found = [
            [torch.stack(loss.pair_derivatives(s, t)) for s, t in zip(similarity, along, strict=True)] for along in tangent
        ]
        return torch.stack([torch.cat(of_batches, -1) for of_batches in found], 1)
    return torch.stack(loss.pair_derivatives(similarity, tangent)).flatten(-2)


def _pair_losses(similarity: Tensor, loss: Loss) -> Tensor:
    """[n, B] Pos_n of the pairs of a stack of batches."""
    return loss.pair_loss(similarity) if loss.takes(similarity) else torch.stack([loss.pair_loss(s) for s in similarity])
