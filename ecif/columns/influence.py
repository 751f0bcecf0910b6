"""The columns of influence on a target (`ecif.heads.influence`) and of the second order (`ecif.projected.second_order`)."""

import torch
from torch import Tensor

from ecif.columns.contract import Column, HeldOutPairs
from ecif.heads import Heads, embed
from ecif.heads.influence import score

LEVERAGE = Column(
    "leverage",
    "low",
    "1",
    "Largest share, below 1, that the pair makes up of the curvature along any direction; above 0.5 its influence is an "
    "extrapolation.",
)


def influence_columns(target: str, unit: str = "nats") -> list[Column]:
    """Both parts of the influence on a target, and their sum.

    Args:
        target: the target's name.
        unit: unit of the target's loss, which is summed over the target's pairs.
    """
    change = "Predicted change of the target's summed loss if the pair were removed"
    sign = "above 0 the pair helps the target, below 0 it harms it"
    return [
        Column(f"influence_positive_{target}", "high", unit, f"{change} as a positive: its own image and caption."),
        Column(f"influence_negative_{target}", "high", unit, f"{change} as a negative of the other pairs of its batch."),
        Column(f"influence_{target}", "high", unit, f"{change}, positive and negative part together; {sign}."),
    ]


def held_out_influence(pairs: HeldOutPairs, fits: list[list[Heads]], directions: list[Tensor]) -> Tensor:
    """Positive and negative part of the influence on T targets, [2, T, N] in loss units.

    Every pair is scored by the heads that were fitted without its fold. Its influence is the mean over these fits and over the
    batches that the pair is in.

    Args:
        pairs: pairs of any folds; their `fitted` is not read.
        fits: [K][fits] heads; those of fold k were fitted without the pairs of fold k.
        directions: for each target, the directions [K, fits, P] that were solved for these heads.
    """
    influence = pairs.images.new_zeros(2, len(directions), len(pairs.images))
    for f, of_fold in enumerate(fits if directions else []):
        mine = pairs.fold == f
        for s, heads in enumerate(of_fold):
            moves = torch.stack([of_target[f, s] for of_target in directions])
            scores = score(heads, embed(heads, pairs.images, pairs.texts), pairs.batches, moves, pairs.loss)
            influence[:, :, mine] += torch.stack([scores.positive, scores.negative])[:, :, mine] / len(of_fold)
    return influence
