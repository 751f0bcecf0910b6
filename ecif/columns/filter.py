"""The order in which a target's filter keeps pairs: those that belong together first, see `ecif.columns.misalignment`.

A pair's place is that of its probability among the quantiles of the sample's, so it does not depend on the other pairs of its
shard. Influence is a part of the evidence behind the probability. As a second voice beside it, it gained nothing that held up
on tests by other artists and in whole models (docs/method.md).
"""

import torch
from torch import Tensor

from ecif.columns.contract import Column

QUANTILES = 1025  # points that store the sample's distribution of a probability


def filter_column(target: str) -> Column:
    """The column of a target's filter."""
    return Column(
        f"filter_{target}",
        "high",
        "1",
        "How early the target's filter keeps the pair, 0 to 1, by misalignment as learned with this target alone.",
    )


def quantiles(probability: Tensor) -> Tensor:
    """[QUANTILES] float64 quantiles of the sampled pairs' probabilities of misalignment [N]."""
    return probability.double().quantile(torch.linspace(0, 1, QUANTILES, dtype=torch.float64))


def order(probability: Tensor, among: Tensor) -> Tensor:
    """[N] float32 in 0 to 1: the higher, the earlier a pair is kept.

    Args:
        probability: [N] of misalignment.
        among: [QUANTILES] of the sample, see `quantiles`. Between two of them, places are interpolated linearly.
    """
    values = probability.double()
    within = values.clamp(among[0], among[-1])
    below = (torch.searchsorted(among, within, right=True) - 1).clamp(0, len(among) - 2)
    step, width = 1 / (len(among) - 1), among[below + 1] - among[below]
    places = below * step + (step / width * (within - among[below])).where(width > 0, step)
    return (1 - places.masked_fill(values < among[0], 0.0)).float()


def best(scores: Tensor, share: float) -> Tensor:
    """[N] bool: the pairs with the highest scores, exactly round(share N) of them; of equal ones the first."""
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[scores.argsort(descending=True, stable=True)[: round(share * len(scores))]] = True
    return kept
