"""A loss of your own: one class, used wherever ecif uses CLIP's.

    python docs/examples/own_loss.py

ConVIRT (arXiv 2010.00747) weighs the two directions of CLIP's loss: finding the caption of an image counts 0.75, finding the
image of a caption 0.25. The class states the loss of a batch, and the part of it that each pair has as the positive. The rest
follows by autograd: what a pair does as a negative of others, the gradients, and the curvature. That is enough for a loss
that is convex in the similarities, as this one is.

A run takes the class by its path, if the module can be imported on every worker: `loss: my_package.convirt:ConVirt`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

import ecif
from ecif.evaluation import spearman


@dataclass(frozen=True)
class ConVirt(ecif.Loss):
    """InfoNCE with a weight for each direction."""

    image_to_text: float = ecif.option(0.75, "weight of finding the caption of an image", ge=0, le=1)

    def batch_loss(self, similarity: Tensor) -> Tensor:
        """L of a batch; `similarity` is [B, B], row = text, column = image."""
        return self.pair_loss(similarity).sum()

    def pair_loss(self, similarity: Tensor) -> Tensor:
        """Pos_n [B]: the terms in which pair n is the positive."""
        of_image = similarity.logsumexp(0) - similarity.diagonal()
        of_text = similarity.logsumexp(1) - similarity.diagonal()
        return self.image_to_text * of_image + (1 - self.image_to_text) * of_text


def main() -> float:
    """Print and return how far the influence of pairs depends on the loss: the rank correlation of influence under both."""
    random = torch.Generator().manual_seed(0)
    concepts = torch.randn(160, 12, generator=random)
    images = normalize(torch.cat([concepts, 0.5 * torch.randn(160, 12, generator=random)], 1), dim=1)
    texts = normalize(concepts + 0.5 * torch.randn(160, 12, generator=random), dim=1)
    heads = ecif.Heads(torch.randn(24, 8, generator=random), torch.randn(12, 8, generator=random), logit_scale=10.0)

    influence = []
    for loss in (ecif.Clip(), ConVirt(image_to_text=1.0)):
        target = ecif.Contrastive(images[:40], texts[:40], loss=loss)  # asked in the units of the training loss
        few = {"folds": 2, "checkpoints": 1, "iterations": 8, "refits": 4, "repeats": 1, "filter": False}  # fast, for a demo
        settings = ecif.Settings(loss=loss, batch_size=20, **few)
        columns = ecif.attribute(images[40:], texts[40:], {"clean": target}, heads=heads, settings=settings)
        influence.append(columns["influence_clean"])
    agreement = float(spearman(*influence))
    print(f"rank correlation of influence under CLIP's loss and under one direction of it: {agreement:.2f}")
    return agreement


if __name__ == "__main__":
    torch.set_num_threads(1)  # with matrices as small as these, more threads only wait for each other
    main()
