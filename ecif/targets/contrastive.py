"""The training loss on clean pairs."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ecif.evaluation import calibrated_loss
from ecif.heads import Heads
from ecif.losses import CLIP, Loss
from ecif.targets.contract import OfPairs


@dataclass(eq=False)
class Contrastive(OfPairs, name="contrastive"):
    """The training loss on these pairs.

    Args:
        images: [N, d_x] image features.
        texts: [N, d_t] text features.
        loss: the training loss of the model; the target's loss is in its units (nats).
        calibrated: see `TargetLoss`.
    """

    has_curvature: ClassVar[bool] = True

    loss: Loss = CLIP

    def batch_loss(self, similarity: Tensor, rows: Tensor) -> Tensor:
        """The batch's loss, see `ecif.losses`."""
        return self.loss.batch_loss(similarity)

    def mean(self, heads: Heads, rows: Tensor) -> float:
        """Mean calibrated loss of CLIP, even if the training loss is another: models are compared as on a test set."""
        return calibrated_loss(heads, self.images[rows], self.texts[rows])
