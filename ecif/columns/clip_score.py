"""The cosine of image and caption (CLIP score, arXiv 2104.08718), under heads that were fitted without the pair."""

from torch import Tensor

from ecif.columns.contract import HeldOutPairs, PairScore
from ecif.heads import Heads, embed


class ClipScore(PairScore, name="clip_score"):
    """Mean of <u_n, v_n> over the seeds."""

    good = "high"
    unit = "cosine"
    says = "Cosine of image and caption under heads fitted to the corpus without the pair's fold, mean over the seeds."
    evidence = True
    of_fold = True

    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] cosine of every pair."""

        def cosine(heads: Heads) -> Tensor:
            embedded = embed(heads, pairs.images, pairs.texts)
            return (embedded.u * embedded.v).sum(1)

        return pairs.mean_over_seeds(cosine)
