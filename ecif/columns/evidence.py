"""The evidence that misalignment is learned from: scores of the sampled pairs with their own captions and with planted ones."""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.columns.bank import Bank
from ecif.columns.misalignment import Misalignment, learn_misalignment, misaligned_probability


class Evidence(NamedTuple):
    """Scores of the N sampled pairs that do not depend on a target."""

    real: Tensor  # [E, N] scores of the pairs with their own captions
    planted: Tensor  # [E, N] scores of planted swaps: each pair with the caption of another pair of its fold
    swapped: Tensor  # [N] bool: the planted caption differs from the pair's own
    fold: Tensor  # [N] int16, the fold of each pair
    bank: Bank  # the bank that the scores were computed with

    def misalignment(self, of_targets: Tensor, planted_of_targets: Tensor) -> Misalignment:
        """Learn to tell planted swaps from the corpus's own pairs.

        Args:
            of_targets: [S, N] scores of the pairs that depend on targets, see `ecif.directions.Directions.scores`.
            planted_of_targets: [S, N] the same of the planted swaps.

        Raises:
            ValueError: no planted caption differs from the pair's own.
        """
        planted = self._planted(planted_of_targets)
        return learn_misalignment(self.of(of_targets), planted, self.fold, self.fold[self.swapped])

    def probability(self, of_targets: Tensor, planted_of_targets: Tensor) -> Tensor:
        """[N] probability of misalignment of the sampled pairs; arguments and errors are those of `misalignment`."""
        return misaligned_probability(self.of(of_targets), self._planted(planted_of_targets))

    def _planted(self, of_targets: Tensor) -> Tensor:
        if not self.swapped.any():
            raise ValueError("all captions of the sampled pairs are alike: nothing tells which belong to their images")
        return torch.cat([self.planted, of_targets]).T[self.swapped]

    def of(self, of_targets: Tensor) -> Tensor:
        """[N, E + S] evidence of the pairs, with scores [S, N] that depend on targets."""
        return torch.cat([self.real, of_targets]).T
