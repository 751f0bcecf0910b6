"""Sections about what is computed: how heads are fitted, systems solved, pairs scored and filters chosen."""

from typing import Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from pipeline.kinds import find_kind, path_of
from pipeline.sections.section import Section


class Fit(Section):
    """Bring the heads to a minimum on this corpus, out of sample for every pair."""

    sample: PositiveInt = Field(65_536, description="pairs to fit and solve on, as whole batches chosen by hash")
    folds: int = Field(5, ge=2, description="K: a pair is scored by heads that were fitted without its fold")
    seeds: PositiveInt = Field(1, description="fits per fold whose scores are averaged")
    epochs: PositiveInt | None = Field(
        None, description="passes over the sample; by default chosen by held-out pairs, as many memorise wrong pairs"
    )
    learning_rate: PositiveFloat | None = Field(
        None, description="Adam's, for heads scaled to Frobenius norm sqrt(d); by default chosen by held-out pairs"
    )
    pull: float | None = Field(
        None,
        ge=0,
        description="towards the checkpoint's heads, in units of the curvature's largest eigenvalue; by default chosen by "
        "held-out pairs",
    )
    checkpoints: PositiveInt = Field(
        2, description="of each fit, from its first epoch to its last, that influence is averaged over; each costs a solve"
    )
    train_logit_scale: bool = Field(False, description="the logit scale is fitted too, and part of gradients and curvature")

    @property
    def fits(self) -> int:
        """Sets of heads that score a pair."""
        return self.seeds * self.checkpoints

    @model_validator(mode="after")
    def _an_epoch_each(self) -> "Fit":
        if self.epochs and self.checkpoints > self.epochs:
            raise ValueError(f"{self.checkpoints} checkpoints need as many epochs")
        return self


class Solve(Section):
    """The shared inverse-Hessian system."""

    iterations: PositiveInt = Field(
        24, description="conjugate gradient steps; each is one Gauss-Newton product over the sample"
    )
    refits: int = Field(16, ge=4, description="real refits without random pairs that the damping is calibrated against")
    dampings: list[PositiveFloat] = Field(
        [3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0],
        min_length=1,
        description="candidates, in units of the curvature's largest eigenvalue, of which those that `iterations` solve are "
        "tried; one value switches the choice off",
    )
    target_batch: int = Field(50, ge=2, description="target pairs that share a softmax in the target's loss")

    @property
    def calibration_refits(self) -> int:
        """Refits that the choice of the damping takes: none where there is nothing to choose."""
        return self.refits if len(self.dampings) > 1 else 0


class Score(Section):
    """Columns from features."""

    repeats: PositiveInt | None = Field(
        None,
        description="permutations of the batches that scores are averaged over; by default 4, and fewer for batches above 256: "
        "a pair meets about 1024 others",
    )
    negative: Literal["exact", "taylor"] = Field(
        "exact", description="exact -log(1 - P), or taylor: the paper's first-order form of CLIP's loss"
    )
    order: Literal[1, 2] = Field(1, description="2 counts the pair's own curvature and the target's too, and writes `leverage`")
    order_rank: tuple[PositiveInt, PositiveInt] = Field(
        (16, 16), description="numbers that features and embeddings keep in the correction of order 2, at most all of them"
    )
    columns: list[str] = Field(
        [], description="further columns: names of scores (docs/columns.md), or your own as package.module:Class"
    )

    @field_validator("columns")
    @classmethod
    def _scores(cls, columns: list[str]) -> list[str]:
        from ecif.columns import PairScore

        return [path_of(find_kind(PairScore, name)) for name in columns]


class Filter(Section):
    """Which pairs to keep for each target, judged by parts of it that had no say; `filter: null` leaves it out."""

    seeds: int = Field(2, ge=2, description="fits of each candidate and part of the target; their spread tells the noise")


class Index(Section):
    """Every pair's gradient in few numbers, for questions not asked yet; `index: {}` switches it on."""

    rank: tuple[PositiveInt, PositiveInt] = Field(
        (32, 32),
        description="numbers that features and embeddings keep in each head, at most all of them: their product, "
        "8 bytes each, is stored for a pair",
    )
    projection: Literal["pca", "random"] = Field("pca", description="pca of the fitted sample, or seeded random signs")
    damping: PositiveFloat = Field(0.01, description="in units of the projected curvature's largest eigenvalue")


class Scoring(Section):
    """Whose parameters influence moves: the two heads, or any of the model's by forward-mode differentiation."""

    mode: Literal["heads", "forward"] = Field("heads", description="heads, or forward for the parameters named below")
    parameters: list[str] = Field(
        [],
        description="forward: shell patterns over open_clip's parameter names (visual.transformer.resblocks.11.*); * for all",
    )
    sample: PositiveInt = Field(
        2048, description="forward: pairs whose batches give the curvature; their decoded pixels stay in the actors' memory"
    )
    epochs: int = Field(
        0, ge=0, description="forward: passes over the sample that fit the parameters first; 0 takes the checkpoint as it is"
    )
    learning_rate: PositiveFloat = Field(1e-5, description="forward: Adam's, of that fit")
    damping: PositiveFloat | None = Field(
        None,
        description="forward: in units of the curvature's largest eigenvalue; by default what `solve` chose for the heads",
    )
    iterations: PositiveInt = Field(50, description="forward: most conjugate gradient steps; each is a product over the sample")
    tolerance: PositiveFloat = Field(0.01, description="forward: a target is solved when its relative residual is this small")

    @model_validator(mode="after")
    def _parameters_of_its_mode(self) -> Self:
        if self.mode == "forward" and not self.parameters:
            raise ValueError("mode forward needs parameters: shell patterns over the model's parameter names, ['*'] for all")
        if self.mode == "heads" and self != Scoring.model_construct():
            raise ValueError("mode heads takes no other key: the rest is for mode forward")
        return self
