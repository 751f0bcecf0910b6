"""A loss and a target of a user's own, as docs/method.md says how to add them."""

from dataclasses import dataclass

import torch
from torch import Tensor

import ecif


@dataclass(frozen=True)
class AdditiveMargin(ecif.Loss, name="additive_margin"):
    """InfoNCE whose positives have to win by a margin (additive margin softmax of LaBSE, arXiv 2007.01852)."""

    margin: float = ecif.option(2.0, "by which a positive has to win, in logits", ge=0)

    def batch_loss(self, similarity: Tensor) -> Tensor:
        return self.pair_loss(similarity).sum()

    def pair_loss(self, similarity: Tensor) -> Tensor:
        shifted = similarity - self.margin * torch.eye(len(similarity), dtype=similarity.dtype, device=similarity.device)
        return shifted.logsumexp(0) + shifted.logsumexp(1) - 2 * shifted.diagonal()


@dataclass(eq=False)
class WrongFirst(ecif.OfPairs):
    """How many wrong images come before a caption's own, softly counted. It has no name: its path is enough."""

    has_temperature = False

    sharpness: float = ecif.option(1.0, "of the sigmoid that counts, a logit", gt=0)

    def batch_loss(self, similarity: Tensor, rows: Tensor) -> Tensor:
        before = torch.sigmoid(self.sharpness * (similarity - similarity.diagonal()[:, None]))
        return before.sum() - before.diagonal().sum()


class WithoutPairLoss(ecif.Loss):
    """A loss that is not finished."""

    def batch_loss(self, similarity: Tensor) -> Tensor:
        return similarity.sum()
