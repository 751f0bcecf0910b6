"""The change of a batch's loss when several of its pairs are removed together.

The changes of single removals do not add up. If a caption has two strong negatives, removing one of them changes its loss
little, because the other is still there. Removing a set E of pairs lowers the loss by L(B) - L(B without E). The derivative of
this difference along a change S' of the similarities is

    sum_ij C_ij S'_ij,   C = dL(B)/dS - dL(B without E)/dS

The second term of C is 0 at entries that are removed. For one pair, this is the derivative of Pos_n + Neg_n.
"""

from torch import Tensor

from ecif.losses.contract import Loss


def removed_cotangent(loss: Loss, similarity: Tensor, leaving: Tensor) -> Tensor:
    """C, the derivative of L(B) - L(B without E) with respect to S.

    Args:
        loss: the loss of the batch.
        similarity: S [B, B].
        leaving: bool [B], the pairs of E. All of the batch may leave.

    Returns:
        [B, B], in the dtype of S.
    """
    cotangent = loss.cotangent(similarity)
    stays = (~leaving).nonzero()[:, 0]
    if len(stays):
        entries = (stays[:, None], stays)
        cotangent = cotangent.index_put(entries, -loss.cotangent(similarity[entries]), accumulate=True)
    return cotangent
