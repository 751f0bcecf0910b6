"""The cosine of image and caption (CLIP score, arXiv 2104.08718) under the checkpoint's own heads.

This is what DataComp's `clip_b32_similarity_score` and img2dataset's `similarity` are for their models. It says nothing where
the checkpoint's projections are untrained.
"""

from torch import Tensor

from ecif.columns.contract import HeldOutPairs, PairScore
from ecif.heads import embed


class ClipScore(PairScore, name="clip_score"):
    """<u_n, v_n>."""

    good = "high"
    unit = "cosine"
    says = "Cosine of image and caption under the checkpoint's own heads."
    evidence = True
    version = 2

    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] cosine of every pair."""
        embedded = embed(pairs.checkpoint, pairs.images, pairs.texts)
        return (embedded.u * embedded.v).sum(1)
