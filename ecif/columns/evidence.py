"""The evidence that misalignment is learned from: scores of the sampled pairs with their own captions and with planted ones."""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.columns.bank import Bank
from ecif.columns.misalignment import Misalignment, learn_misalignment


class Evidence(NamedTuple):
    """Scores of the N sampled pairs that do not depend on a target."""

    real: Tensor  # [E, N] scores of the pairs with their own captions
    planted: Tensor  # [E, N] scores of planted swaps: each pair with the caption of another pair of its fold
    swapped: Tensor  # [N] bool: the planted caption differs from the pair's own
    bank: Bank  # the bank that the scores were computed with

    def misalignment(self, influence: Tensor, planted_influence: Tensor) -> Misalignment:
        """Learn to tell planted swaps from the corpus's own pairs.

        Args:
            influence: [T, N] influence of the pairs on T targets.
            planted_influence: [T, N] influence of the planted swaps.

        Raises:
            ValueError: no planted caption differs from the pair's own.
        """
        if not self.swapped.any():
            raise ValueError("all captions of the sampled pairs are alike: nothing tells which belong to their images")
        return learn_misalignment(self.of(influence), torch.cat([self.planted, planted_influence]).T[self.swapped])

    def of(self, influence: Tensor) -> Tensor:
        """[N, E + T] evidence of the pairs, with influence [T, N] on T targets."""
        return torch.cat([self.real, influence]).T
