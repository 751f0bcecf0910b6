"""The loss of a pair as a positive, Pos_n, under heads that were fitted to the corpus without the pair."""

from torch import Tensor

from ecif.columns.contract import HeldOutPairs, PairScore
from ecif.heads import Heads, embed
from ecif.heads.influence import pair_losses


class HeldOutLoss(PairScore, name="held_out_loss"):
    """Mean of Pos_n over the batches and the seeds."""

    good = "low"
    unit = "nats"
    says = "Loss Pos_n of the pair under heads fitted to the corpus without the pair's fold, mean over batches and seeds."
    evidence = True
    of_fold = True

    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] loss of every pair."""

        def pair_loss(heads: Heads) -> Tensor:
            return pair_losses(heads, embed(heads, pairs.images, pairs.texts), pairs.batches, pairs.loss)

        return pairs.mean_over_seeds(pair_loss)
