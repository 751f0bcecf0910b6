"""What several pairs take away from a batch's loss when they are removed together.

What single removals take away does not add up: of two strong negatives of the same caption, each alone leaves the other to hold
the softmax up. A set E of pairs takes away L(B) - L(B without E). Along a change S' of the similarities, the derivative of that
is

    sum_ij C_ij S'_ij,   C = dL(B)/dS - dL(B without E)/dS

and the second term of C is 0 for entries that are no longer there. For one pair that is the derivative of Pos_n + Neg_n.
"""

from torch import Tensor

from ecif.losses.contract import Loss


def removed_cotangent(loss: Loss, similarity: Tensor, leaving: Tensor) -> Tensor:
    """C, the derivative of L(B) - L(B without E) with respect to S.

    Args:
        loss: of the batch.
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
