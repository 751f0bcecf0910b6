"""How near is a pair's caption to what a target asks about?

Captions are compared by the cosine of their trunk features, centred on the bank's mean. A pair whose caption is far from every
caption of a target has an influence near 0, whether it is good or bad: the target does not ask about it.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecif.columns.contract import Column

CHUNK = 1024  # captions that are compared at once
STEPS = 1024  # nearness is rounded to multiples of 1 / STEPS: equal captions are equally near, whatever computes it
SAME = 0.999  # captions with a larger cosine are equal up to rounding


def near_column(target: str) -> Column:
    """The column of a pair's nearness to a target."""
    return Column(
        f"near_{target}",
        "high",
        "cosine",
        "Of the caption with the target's nearest caption, by centred text features: whether the target asks about the pair.",
    )


def nearness(captions: Tensor, asked: Tensor, centre: Tensor) -> Tensor:
    """[N] float32 cosine of each caption with the nearest caption that a target asks about, rounded.

    Args:
        captions: [N, d_t] text features of the pairs.
        asked: [M, d_t] text features of the target's captions.
        centre: [d_t] mean of the corpus's text features.
    """
    return (_nearest(captions, asked, centre) * STEPS).round() / STEPS


def asked_share(captions: Tensor, asked: Tensor, centre: Tensor, among: Tensor) -> float:
    """The share of pairs, 0 to 1, that a target says something about.

    A pair counts if a caption of the target is as near to its caption as the nearest other caption of the corpus.

    Args:
        captions: [N, d_t] text features of the pairs to count.
        asked: [M, d_t] text features of the target's captions.
        centre: [d_t] mean of the corpus's text features.
        among: [C, d_t] text features of the corpus's distinct captions.
    """
    known = normalize(among.float() - centre, dim=1)
    nearest = []
    for part in captions.split(CHUNK):
        cosine = normalize(part.float() - centre, dim=1) @ known.T
        nearest.append(cosine.masked_fill(cosine > SAME, -1.0).amax(1))
    return (_nearest(captions, asked, centre) >= torch.cat(nearest)).double().mean().item()


def _nearest(captions: Tensor, asked: Tensor, centre: Tensor) -> Tensor:
    known = normalize(asked.float() - centre, dim=1).unique(dim=0)
    parts = (normalize(part.float() - centre, dim=1) @ known.T for part in captions.split(CHUNK))
    return torch.cat([part.amax(1) for part in parts])
