"""The contract of a score column: the pairs that it is computed from, and how it describes itself.

A score is one file with one subclass of `PairScore`, registered under its name:

    class ClipScore(PairScore, name="clip_score"):
        good, unit, says = "high", "cosine", "Cosine of image and caption."

        def values(self, pairs: HeldOutPairs) -> Tensor: ...

A column that a whole stage computes, such as influence, is no `PairScore`. A `Column` beside the stage's code describes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ecif.columns.bank import Bank
from ecif.heads import Heads
from ecif.losses import Loss
from ecif.registry import Kind

Good = Literal["high", "low"]


class HeldOutPairs(NamedTuple):
    """N pairs, and everything that their scores may be computed from. All tensors are on one device."""

    images: Tensor  # [N, d_x] float32 unit trunk features
    texts: Tensor  # [N, d_t] float32 unit trunk features; row n belongs to image n
    fold: Tensor  # [N] int, the fold of each pair
    batches: list[Tensor]  # rows that share a softmax, batches of all repeats; a score is the mean over a pair's batches
    checkpoint: Heads  # the model's own heads
    fitted: list[Heads]  # for each seed, the last checkpoint of a fit without the scored pairs' fold, see `PairScore.of_fold`
    loss: Loss  # the loss that the heads were fitted with
    bank: Bank  # neighbours are found among its pairs
    target_images: Tensor | None = None  # [M, d_x] image features of a target, for scores with `each_target`

    def mean_over_seeds(self, of_heads: Callable[[Heads], Tensor]) -> Tensor:
        """[N] mean of a score over the fitted heads.

        Args:
            of_heads: gives the score [N] under one set of heads.
        """
        total = self.images.new_zeros(len(self.images))
        for heads in self.fitted:
            total += of_heads(heads) / len(self.fitted)
        return total

    def mean_over_batches(self, of_batch: Callable[[Tensor], Tensor]) -> Tensor:
        """[N] mean of a score over the batches that a pair is in; NaN for a pair in none.

        Args:
            of_batch: gives the score [B] of the pairs at the rows [B] of one batch.
        """
        total = self.images.new_zeros(len(self.images))
        count = torch.zeros_like(total)
        for rows in self.batches:
            total[rows] += of_batch(rows)
            count[rows] += 1
        return total / count


class PairScore(Kind, ABC):
    """A score of pairs: one column, or one column for each target."""

    good: ClassVar[Good]  # whether good pairs have high or low values
    unit: ClassVar[str]  # "cosine", "nats", "probability"; "1" for a number without a unit
    says: ClassVar[str]  # one sentence for a person who reads the Parquet schema
    evidence: ClassVar[bool] = False  # misalignment is learned from this score, among others
    of_fold: ClassVar[bool] = False  # uses `fitted`, heads fitted without the pair: it is computed fold by fold
    each_target: ClassVar[bool] = False  # uses `target_images`: one column for each target, <name>_<target>

    @abstractmethod
    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] score of every pair, in the dtype of the features (float32)."""


class Column(NamedTuple):
    """A column as the Parquet schema, the reports and the docs describe it."""

    name: str
    good: Good
    unit: str
    says: str

    @classmethod
    def of(cls, score: type[PairScore], target: str | None = None) -> "Column":
        """The column of a score.

        Args:
            score: its class.
            target: name of the target, if the score has `each_target`.
        """
        return cls(f"{score.name}_{target}" if score.each_target else score.name, score.good, score.unit, score.says)


def held_out_values(score: PairScore, pairs: HeldOutPairs, fitted: list[list[Heads]]) -> Tensor:
    """Score [N] of pairs of all folds. With `of_fold`, every pair is scored by heads that were fitted without its fold.

    Args:
        score: the score to compute.
        pairs: pairs of any folds; their `fitted` is not read.
        fitted: [K folds][seeds] heads; those of fold k were fitted without the pairs of fold k.
    """
    if not score.of_fold:
        return score.values(pairs)
    values = pairs.images.new_full((len(pairs.images),), torch.nan)
    for fold, heads in enumerate(fitted):
        own = pairs.fold == fold
        if own.any():
            values[own] = score.values(pairs._replace(fitted=heads))[own]
    return values
