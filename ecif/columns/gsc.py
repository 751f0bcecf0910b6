"""Intra-modal structure consistency (GSC; Zhao et al., arXiv 2405.16996).

It asks whether an image is as similar to the other images of its batch as its caption is to their captions:

    gsc_n = cos( (<x_n, x_j>)_j, (<t_n, t_j>)_j )

The two vectors are the pair's rows of the image and of the text similarity matrix of the batch, from unit trunk features. Each
row includes the pair's similarity 1 with itself. The score is the mean over the pair's batches.
"""

from torch import Tensor
from torch.nn.functional import cosine_similarity

from ecif.columns.contract import HeldOutPairs, PairScore


class Gsc(PairScore, name="gsc"):
    """Are image and caption similar to the same other pairs of the batch?"""

    good = "high"
    unit = "cosine"
    says = "Cosine of the image's similarities to the images of its batch with the caption's to their captions (GSC)."

    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] score of every pair."""

        def of_batch(rows: Tensor) -> Tensor:
            images, texts = pairs.images[rows], pairs.texts[rows]
            return cosine_similarity(images @ images.T, texts @ texts.T)

        return pairs.mean_over_batches(of_batch)
