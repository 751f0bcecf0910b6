"""The contract of a target: clean data, and a loss on it as a function of the heads. Influence predicts changes of this loss.

A kind of target is a subclass of `TargetLoss` with three methods: the captions, the similarities of a batch, and the loss as a
function of these similarities. A target's loss is the sum over its pairs, not their mean, as the training loss is.

    class Recall(OfPairs, name="recall"): ...

registers a kind. It is a dataclass. Fields that `TargetData` also has are filled with the target's data; all others are
options.
"""

from abc import ABC, abstractmethod
from dataclasses import Field, dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ecif.heads import Heads, embed, logits
from ecif.losses import CLIP, Loss
from ecif.registry import Kind, option
from ecif.temperature import best_temperature


class TargetData(NamedTuple):
    """The data of a target, on one device. A kind takes those that it has fields for."""

    images: Tensor  # [N, d_x] image features
    texts: Tensor  # [N, d_t] text features
    labels: Tensor | None = None  # int64 [N], the class of each image; for labelled kinds
    prompts: Tensor | None = None  # [C, M, d_t] text features of M templates for each of C classes; for labelled kinds
    loss: Loss = CLIP  # the training loss of the model


@dataclass(eq=False, kw_only=True)
class TargetLoss(Kind, ABC):
    """A target's pairs and the loss on them.

    A calibrated loss is min over tau of L(tau S), the loss at its own best temperature. Without calibration, a change of
    confidence, which leaves every ranking as it is, hides the change of ranking. By the envelope theorem, the gradient is that
    of L(tau S) with the best tau held fixed. All batches of a call share one tau.

    Attributes:
        has_temperature: the loss is convex in a factor on the similarities, so that it has a best temperature. A kind without
            a temperature has no option `calibrated`.
        has_curvature: without calibration, the loss is the training loss on the target's pairs. Its gradient and Gauss-Newton
            matrix are then known for any parameters, as second order and forward mode need.
        labelled: the target has images with a class each. It reads labels and prompts instead of captions.
        images: [N, d_x] features of the target's images.
    """

    unit: ClassVar[str] = "nats"  # of the loss
    has_temperature: ClassVar[bool] = True
    has_curvature: ClassVar[bool] = False
    labelled: ClassVar[bool] = False

    images: Tensor
    calibrated: bool = option(
        False, "take the loss at its best temperature, so that a mere change of confidence does not count"
    )

    @abstractmethod
    def captions(self) -> Tensor:
        """[N, d_t] text features that say what each pair is about, for `ecif.targets.coverage`."""

    @abstractmethod
    def similarities(self, heads: Heads, batches: list[Tensor]) -> list[Tensor]:
        """The similarity matrix of each batch, differentiable in the heads. `batch_loss` is a function of it."""

    @abstractmethod
    def batch_loss(self, similarity: Tensor, rows: Tensor) -> Tensor:
        """Summed loss, a scalar, of the pairs at `rows`, given their similarities."""

    @classmethod
    def options(cls) -> list[Field[Any]]:
        """The fields that a configuration may set: those that hold no data."""
        others = TargetData._fields if cls.has_temperature else (*TargetData._fields, "calibrated")
        return [option for option in super().options() if option.name not in others]

    @classmethod
    def of(cls, data: TargetData, **options: Any) -> Self:
        """The loss on a target, given its data and values for `options`."""
        own = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in data._asdict().items() if name in own}, **options)

    def value(self, heads: Heads, batches: list[Tensor]) -> Tensor:
        """Loss of some of the target's pairs, a scalar in loss units.

        Args:
            heads: the heads at which the loss is taken.
            batches: rows of the target. If the loss has negatives, the pairs of a batch are each other's negatives.
        """
        similarities = self.similarities(heads, batches)
        if self.calibrated and self.has_temperature:
            fixed = [s.detach().double() for s in similarities]
            tau = best_temperature(lambda tau: self._sum([tau * s for s in fixed], batches))
            similarities = [tau * s for s in similarities]
        return self._sum(similarities, batches)

    def gradient(self, heads: Heads, batches: list[Tensor]) -> Tensor:
        """Gradient [P] of `value` with respect to both heads."""
        weights = heads.flat().detach().requires_grad_()
        image, text = heads.split(weights)
        moved = heads._replace(image=image, text=text)
        log_scale, bias = heads.split_scalars(weights)
        if heads.train_logit_scale:
            moved = moved._replace(logit_scale=log_scale.exp())  # type: ignore[arg-type]  # a tensor, to differentiate
        if heads.train_logit_bias:
            moved = moved._replace(logit_bias=bias)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(self.value(moved, batches), weights)
        return gradient

    def mean(self, heads: Heads, rows: Tensor) -> float:
        """Mean loss of the pairs at `rows`, all in one batch and at the best temperature, to compare models by."""
        return replace(self, calibrated=True).value(heads, [rows]).item() / len(rows)

    def _sum(self, similarities: list[Tensor], batches: list[Tensor]) -> Tensor:
        return torch.stack([self.batch_loss(s, rows) for s, rows in zip(similarities, batches, strict=True)]).sum()


@dataclass(eq=False)
class OfPairs(TargetLoss):
    """A loss on images [N, d_x] and the captions [N, d_t] that belong to them."""

    images: Tensor
    texts: Tensor

    def captions(self) -> Tensor:
        """[N, d_t] text features of the captions."""
        return self.texts

    def similarities(self, heads: Heads, batches: list[Tensor]) -> list[Tensor]:
        """Logits S [B, B] of each batch, row = text."""
        return [logits(heads, embed(heads, self.images[rows], self.texts[rows])) for rows in batches]
