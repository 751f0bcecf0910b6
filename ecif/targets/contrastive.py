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
        images: [N, d_x].
        texts: [N, d_t].
        loss: what the model is trained with; the target's loss is in its units (nats).
        calibrated: see `TargetLoss`.
    """

    has_curvature: ClassVar[bool] = True

    loss: Loss = CLIP

    def batch_loss(self, similarity: Tensor, rows: Tensor) -> Tensor:
        """The batch's loss, see `ecif.losses`."""
        return self.loss.batch_loss(similarity)

    def mean(self, heads: Heads, rows: Tensor) -> float:
        """CLIP's calibrated loss a pair, whatever the training loss: models are compared here as they are on a test set."""
        return calibrated_loss(heads, self.images[rows], self.texts[rows])
