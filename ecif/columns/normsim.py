"""NormSim (Wang et al., arXiv 2405.19547): how similar a pair's image is to the images of a target.

    normsim_2_n = | X_T f_n |_2,      normsim_inf_n = max over the rows of X_T f_n

X_T [M, d_x] holds the image features of the target, and f_n is the image feature of the pair. All are trunk features of unit
length. Captions are not used.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ecif.columns.contract import HeldOutPairs, PairScore

CHUNK = 256  # pairs that are compared with the target at once


class NormSim2(PairScore, name="normsim_2"):
    """The 2-norm of a pair's cosines with the target's images."""

    good = "high"
    unit = "cosine"
    says = "Norm of the cosines of the pair's image with the images of the target (NormSim-2)."
    each_target = True

    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] norm of every pair."""
        return torch.cat([cosines.norm(dim=1) for cosines in _cosines(pairs)])


class NormSimInf(PairScore, name="normsim_inf"):
    """The largest of a pair's cosines with the target's images."""

    good = "high"
    unit = "cosine"
    says = "Cosine of the pair's image with the nearest image of the target (NormSim-infinity)."
    each_target = True

    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] largest cosine of every pair."""
        return torch.cat([cosines.amax(1) for cosines in _cosines(pairs)])


def _cosines(pairs: HeldOutPairs) -> Iterator[Tensor]:
    """X_T f [chunk, M], chunk by chunk.

    Raises:
        ValueError: the target has no images.
    """
    if pairs.target_images is None:
        raise ValueError("NormSim compares with the images of a target, and this one has none")
    return (images @ pairs.target_images.T for images in pairs.images.split(CHUNK))
