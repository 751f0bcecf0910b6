"""Retrieval: hinges on wrong pairings that come near the right one."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ecif.heads import Heads
from ecif.registry import option
from ecif.targets.contract import OfPairs


@dataclass(eq=False)
class RetrievalMargin(OfPairs, name="retrieval_margin"):
    """Hinges on wrong pairings that come within a margin of the right one: triplet ranking loss on cosines.

    sum_i sum_{j != i} [m + c_ij - c_ii]_+ + [m + c_ji - c_ii]_+, c_ij = <u_i, v_j>: the sum-of-hinges loss of VSE++
    (arXiv 1707.05612, equation 5). It has no temperature. The loss and its gradient are 0 once every right pairing is better
    than all wrong ones by the margin.

    Args:
        images: [N, d_x] image features.
        texts: [N, d_t] text features.
        margin: m, in cosine.
    """

    unit: ClassVar[str] = "cosine"
    has_temperature: ClassVar[bool] = False

    margin: float = option(0.2, "by which the right pairing has to be better than a wrong one, in cosine", gt=0)

    def batch_loss(self, similarity: Tensor, rows: Tensor) -> Tensor:
        """Sum of hinges over both directions, in cosine; `similarity` holds cosines."""
        own = similarity.diagonal()
        hinges = (self.margin + similarity - own[:, None]).relu() + (self.margin + similarity - own[None, :]).relu()
        return hinges.fill_diagonal_(0.0).sum()

    def similarities(self, heads: Heads, batches: list[Tensor]) -> list[Tensor]:
        """Cosines c [B, B] of each batch, row = text."""
        return super().similarities(heads._replace(logit_scale=1.0, logit_bias=0.0), batches)
