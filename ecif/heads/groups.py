"""The influence of several pairs that are removed together, such as all pairs of one source."""

from torch import Tensor

from ecif.heads import Embedded, Heads, logits, logits_jvp, tangents
from ecif.losses import CLIP, Loss
from ecif.losses.groups import removed_cotangent


def group_influence(
    heads: Heads, pairs: Embedded, batches: list[Tensor], directions: Tensor, group: Tensor, loss: Loss = CLIP
) -> Tensor:
    """The predicted change of each target's loss if all pairs of a group are removed together, to first order in the step.

    The influence of pairs in different batches adds up. That of pairs in one batch does not, see `ecif.losses.groups`.

    Args:
        heads: the heads that the directions were solved for.
        pairs: all N pairs under these heads.
        batches: index tensors; a pair is in one batch at most, as in one epoch of training.
        directions: [T, P], q = H^-1 grad L_T of each target.
        group: [N] bool, the pairs that are removed. A batch may lose all of its pairs.
        loss: what the heads were fitted with.

    Returns:
        [T] in loss units of the target's summed loss: above 0 the group helps, below 0 it harms.
    """
    moved = [tangents(heads, pairs, direction) for direction in directions]
    total = pairs.u.new_zeros(len(moved))
    for rows in batches:
        leaving = group[rows]
        if not leaving.any():
            continue
        batch = pairs.take(rows)
        removed = removed_cotangent(loss, logits(heads, batch), leaving)
        for t, (du, dv, shift) in enumerate(moved):
            total[t] += (removed * logits_jvp(heads, batch, du[rows], dv[rows], shift)).sum()
    return total
