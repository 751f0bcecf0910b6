"""Scores of a user's own."""

from torch import Tensor

from ecif.columns import HeldOutPairs, PairScore


class ImageNorm(PairScore, name="image_norm"):
    """Which says nothing about a pair."""

    good, unit, says = "high", "1", "Norm of the image's features."

    def values(self, pairs: HeldOutPairs) -> Tensor:
        return pairs.images.norm(dim=1)


class SameLength(PairScore, name="same_length"):
    """Which says that misalignment is to be learned from it."""

    good, unit, says, evidence = "low", "1", "By how much the lengths of image and caption features differ.", True

    def values(self, pairs: HeldOutPairs) -> Tensor:
        return (pairs.images.norm(dim=1) - pairs.texts.norm(dim=1)).abs()


class NearTarget(PairScore, name="near_target"):
    """Of a target."""

    good, unit, says, each_target = "high", "cosine", "Mean cosine of the image with the target's.", True

    def values(self, pairs: HeldOutPairs) -> Tensor:
        return (pairs.images @ pairs.target_images.T).mean(1)
