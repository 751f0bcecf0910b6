"""The training loss on clean pairs."""

from torch import Tensor

from ecif.losses import CLIP, Loss
from ecif.targets.contract import OfPairs


class Contrastive(OfPairs):
    """The loss of training, on held-out pairs, in nats.

    Args:
        loss: what the model is trained with.
    """

    def __init__(self, images: Tensor, texts: Tensor, calibrated: bool = False, loss: Loss = CLIP):
        super().__init__(images, texts, calibrated)
        self.loss = loss

    def batch_loss(self, similarity: Tensor, rows: Tensor) -> Tensor:
        """The batch's loss, see `ecif.losses`."""
        return self.loss.batch_loss(similarity)
