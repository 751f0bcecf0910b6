"""How much of a corpus's subjects a target covers."""

import torch
from torch import Tensor

NEIGHBOURS = 5  # other captions in a caption's neighbourhood
ENOUGH_COVERAGE = 0.8  # with less, filters overfitted the target on the demo's corpus, see docs/method.md


def coverage(corpus: Tensor, target: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """The share of a corpus's captions that have a caption of the target in their neighbourhood.

    A caption's neighbourhood reaches to its k-th nearest other caption of the corpus. This is the coverage of Naeem et al.
    (arXiv 2002.09797) with the target in the place of the generated samples. A target of M captions that are drawn like the R
    captions of the corpus covers 1 - (R / (R + M))^k of them. Coverage is low for a small target, and for a target of any size
    that lacks concepts.

    Args:
        corpus: [R, d] unit text embeddings of distinct captions. The larger R is, the finer concepts are told apart.
        target: [M, d] unit text embeddings of the target's captions.
        neighbours: k.

    Returns:
        0 to 1.
    """
    among = (corpus @ corpus.T).fill_diagonal_(-1.0)
    reach = among.topk(min(neighbours, len(corpus)), dim=1).values[:, -1]
    nearest = torch.stack([(corpus @ part.T).amax(1) for part in target.split(4096)]).amax(0)
    return (nearest >= reach).double().mean().item()
