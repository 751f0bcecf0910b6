"""How much of a corpus a target asks about."""

import torch
from torch import Tensor

NEIGHBOURS = 5  # that make a caption's neighbourhood
ENOUGH_COVERAGE = 0.8  # below it filters overfitted the target on the demo's corpus, see docs/method.md


def coverage(corpus: Tensor, target: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """How much of what a corpus is about a target asks about: the share of captions with a target pair in their neighbourhood.

    A caption's neighbourhood reaches to its k-th nearest other caption of the corpus; this is the coverage of Naeem et al.
    (arXiv 2002.09797) with the target in the place of the generated samples. M pairs drawn like R captions cover
    1 - (R / (R + M))^k of them: little where a target is small, and where it lacks concepts however large it is.

    Args:
        corpus: [R, d], unit text embeddings of distinct captions. R is the resolution at which concepts are told apart.
        target: [M, d], those of the target's pairs.
        neighbours: k.

    Returns:
        0 to 1.
    """
    among = (corpus @ corpus.T).fill_diagonal_(-1.0)
    reach = among.topk(min(neighbours, len(corpus)), dim=1).values[:, -1]
    nearest = torch.stack([(corpus @ part.T).amax(1) for part in target.split(4096)]).amax(0)
    return (nearest >= reach).double().mean().item()
