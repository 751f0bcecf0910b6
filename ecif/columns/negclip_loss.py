"""negCLIPLoss (Wang et al., arXiv 2405.19547): the cosine of a pair, minus a soft maximum of its cosines with the batch.

    negclip_n = c_nn - tau/2 ( log sum_j exp(c_nj / tau) + log sum_i exp(c_in / tau) )

c_ij is the cosine of text i with image j of the batch, and tau = 1 / logit_scale. Both are those of the checkpoint. The score
is the mean over several random batches.
"""

from torch import Tensor

from ecif.columns.contract import HeldOutPairs, PairScore
from ecif.heads import embed


class NegClipLoss(PairScore, name="negclip_loss"):
    """Cosine of image and caption, normalised by the batch."""

    good = "high"
    unit = "cosine"
    says = "Cosine under the checkpoint's heads, less the soft maximum over the captions and images of the batch (negCLIPLoss)."

    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] score of every pair."""
        embedded, scale = embed(pairs.checkpoint, pairs.images, pairs.texts), pairs.checkpoint.logit_scale

        def of_batch(rows: Tensor) -> Tensor:
            cosine = embedded.u[rows] @ embedded.v[rows].T
            normaliser = (scale * cosine).logsumexp(1) + (scale * cosine).logsumexp(0)
            return cosine.diagonal() - normaliser / (2 * scale)

        return pairs.mean_over_batches(of_batch)
