"""Zero-shot classification by prompts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ecif.heads import Heads, embed
from ecif.targets.contract import TargetLoss


@dataclass(eq=False)
class ZeroShot(TargetLoss, name="zero_shot"):
    """Classification of images, whose class index is in <key>.cls, by prompts: cross-entropy against all classes, in nats.

    A class is the normalised mean of its templates' unit text embeddings, as in open_clip's zero-shot classifier.

    Args:
        images: [N, d_x] image features.
        labels: int64 [N], the class of each image.
        prompts: [C, M, d_t], text features of M templates for each of C classes.
        calibrated: see `TargetLoss`.
    """

    labelled: ClassVar[bool] = True

    images: Tensor
    labels: Tensor
    prompts: Tensor

    def captions(self) -> Tensor:
        """[N, d_t] text features of the first prompt of each image's class."""
        return self.prompts[self.labels, 0]

    def similarities(self, heads: Heads, batches: list[Tensor]) -> list[Tensor]:
        """Logits [C, B] of each batch, row = class, column = image."""
        seen = embed(heads, self.images[torch.cat(batches)], self.prompts.flatten(0, 1))
        classes = normalize(seen.u.view(*self.prompts.shape[:2], -1).mean(1), dim=1)
        return list((heads.logit_scale * classes @ seen.v.T).split([len(rows) for rows in batches], dim=1))

    def batch_loss(self, similarity: Tensor, rows: Tensor) -> Tensor:
        """Summed cross-entropy of the images."""
        return cross_entropy(similarity.T, self.labels[rows], reduction="sum")
