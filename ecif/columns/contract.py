"""What a column of scores is, and what a score of a pair is computed from.

A score is one file with one subclass of `PairScore`, registered under its name:

    class ClipScore(PairScore, name="clip_score"):
        good, unit, says = "high", "cosine", "Cosine of image and caption."

        def values(self, pairs: HeldOutPairs) -> Tensor: ...

Columns that come out of a whole stage, such as influence, state themselves as a `Column` beside the code that they belong to.
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
    """N pairs, and everything that a score of them may be computed from; all tensors on one device."""

    images: Tensor  # [N, d_x] float32 unit trunk features
    texts: Tensor  # [N, d_t] float32 unit trunk features; row n belongs to image n
    fold: Tensor  # [N] int, the fold of each pair
    batches: list[Tensor]  # rows that share a softmax, of all repeats: a pair in several batches gets the mean over them
    checkpoint: Heads  # the model's own heads
    fitted: list[Heads]  # one a seed, fitted to the end; without the pairs that are asked about, see `PairScore.of_fold`
    loss: Loss  # that the heads were fitted with
    bank: Bank
    target_images: Tensor | None = None  # [M, d_x] image features of the target, for the scores of a target

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
    """A score of pairs: one column, or one a target."""

    good: ClassVar[Good]  # the end of the column at which the good pairs are
    unit: ClassVar[str]  # "cosine", "nats", "probability"; "1" for a number without a unit
    says: ClassVar[str]  # one sentence for a person who reads the Parquet schema
    evidence: ClassVar[bool] = False  # part of what misalignment is learned from
    of_fold: ClassVar[bool] = False  # uses `fitted`, heads that never saw the pair: it is asked fold by fold
    each_target: ClassVar[bool] = False  # uses `target_images`: one column a target, <name>_<target>

    @abstractmethod
    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] float32, the score of every pair in the dtype of the features."""


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
            score: the kind.
            target: name of the target where `score.each_target`.
        """
        return cls(f"{score.name}_{target}" if score.each_target else score.name, score.good, score.unit, score.says)


def held_out_values(score: PairScore, pairs: HeldOutPairs, fitted: list[list[Heads]]) -> Tensor:
    """[N] a score of pairs of all folds; with `of_fold`, every pair is scored by the heads that did not see its fold.

    Args:
        score: to compute.
        pairs: of any folds; its own `fitted` is not read.
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
