"""The cosine of image and caption under heads that were fitted to the corpus without the pair."""

from torch import Tensor

from ecif.columns.contract import HeldOutPairs, PairScore
from ecif.heads import Heads, embed


class HeldOutCosine(PairScore, name="held_out_cosine"):
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
