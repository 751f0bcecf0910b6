"""Retrieval: hinges on wrong pairings that come near the right one."""

from torch import Tensor

from ecif.heads import Heads
from ecif.targets.contract import OfPairs


class RetrievalMargin(OfPairs):
    """By how much each wrong pairing comes within a margin of the right one: triplet ranking loss on cosines.

    sum_i sum_{j != i} [m + c_ij - c_ii]_+ + [m + c_ji - c_ii]_+, c_ij = <u_i, v_j>: the sum-of-hinges loss of VSE++
    (arXiv 1707.05612, equation 5). It has no temperature. Zero, and without a gradient, once every pair is right by the margin.

    Args:
        margin: m, in cosine.
    """

    def __init__(self, images: Tensor, texts: Tensor, margin: float):
        super().__init__(images, texts)
        self.margin = margin

    def batch_loss(self, similarity: Tensor, rows: Tensor) -> Tensor:
        """Sum of hinges over both directions, in cosine; `similarity` holds cosines."""
        own = similarity.diagonal()
        hinges = (self.margin + similarity - own[:, None]).relu() + (self.margin + similarity - own[None, :]).relu()
        return hinges.fill_diagonal_(0.0).sum()

    def similarities(self, heads: Heads, batches: list[Tensor]) -> list[Tensor]:
        """Cosines c [B, B] of each batch, row = text."""
        return super().similarities(heads._replace(logit_scale=1.0, logit_bias=0.0), batches)
