"""The configuration of a run. It is typed, validated before anything starts, and explained by the descriptions of its keys."""

import os
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from pipeline import places, storage
from pipeline.errors import UserError
from pipeline.kinds import TrainingLoss, find_kind, path_of
from pipeline.sections import (
    Corpus,
    Embed,
    Filter,
    Fit,
    Index,
    Model,
    Name,
    Nightly,
    Place,
    Prices,
    Score,
    Scoring,
    Section,
    Solve,
    Target,
)


class Config(Section):
    """A run: corpus in, influence columns out."""

    run: Place = Field(description="folder of this run, a path or an fsspec URL; the same command resumes what is there")
    corpus: Corpus
    model: Model
    targets: dict[Name, Target] = Field(min_length=1, description="named clean sets: whose improvement counts")
    loss: TrainingLoss = Field(default_factory=lambda: TrainingLoss(name="clip"))
    batch_size: int = Field(256, ge=2, description="pairs that share a softmax; use the batch size you train with, if it fits")
    batching: str = Field("shuffled", description="which pairs of a shard share one, or your own as package.module:Class")
    seed: int = Field(0, ge=0, description="of batches, folds and fits")
    workers: PositiveInt | None = Field(None, description="actors; by default one a GPU, or one a CPU core where there is none")
    device: Literal["auto", "gpu"] = Field(
        "auto", description="gpu: wait until a GPU has joined; auto: GPUs if there are any by then"
    )
    embed: Embed = Embed()
    fit: Fit = Fit()
    solve: Solve = Solve()
    score: Score = Score()
    filter: Filter | None = Filter()
    index: Index | None = Field(None, description="off by default")
    scoring: Scoring = Scoring()
    nightly: Nightly = Nightly()
    prices: Prices = Prices()

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """The validated configuration of a file. Its relative paths are relative to the file's folder.

        Args:
            path: a path or a URL.

        Raises:
            UserError: the file is wrong; one line about the first fault.
        """
        try:
            place = places.at_home(os.fspath(path))
            text = (storage.read_bytes(place) if places.is_url(place) else Path(place).read_bytes()).decode()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or str(error).removeprefix(f'{path}: ')}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text") from None
        except ValueError as error:  # a path with a NUL, or a home that nobody has
            raise UserError(f"{path}: {error}") from None
        try:
            return cls.model_validate(yaml.safe_load(text) or {}, context={"folder": places.folder_of(place)})
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        except ValidationError as error:
            # A misspelled key is unknown, and may leave a required one missing: the unknown one says what to mend.
            first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
            where = ".".join(str(part) for part in first["loc"]) or "configuration"
            plain = {"extra_forbidden": "no such key", "missing": "this key is required"}
            what = plain.get(first["type"], first["msg"].removeprefix("Value error, "))
            more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
            raise UserError(f"{path}: {where}: {what}{more}; `ecif config` explains every key") from None

    @property
    def repeats(self) -> int:
        """Permutations of the batches that scores are averaged over."""
        return self.score.repeats or min(4, max(1, 1024 // self.batch_size))

    @field_validator("batching")
    @classmethod
    def _batching(cls, name: str) -> str:
        from ecif.batching import Batching

        return path_of(find_kind(Batching, name))

    @field_validator("targets")
    @classmethod
    def _in_one_order(cls, targets: dict[str, Target]) -> dict[str, Target]:
        """Sort targets by name, so that the order in the file changes nothing."""
        for name in targets:
            if name.startswith(("positive", "negative")):
                raise ValueError(f"target name {name!r} would collide with the influence_positive/negative columns")
        return dict(sorted(targets.items()))

    @model_validator(mode="after")
    def _what_the_loss_can(self) -> Self:
        loss, name = self.loss.kind, self.loss.name
        if self.score.negative == "taylor" and not loss.has_taylor:
            raise ValueError(f"score.negative: taylor is a form of CLIP's loss; with loss: {name} only exact")
        for asked, key in ((self.score.order == 2, "score.order: 2"), (self.index is not None, "index")):
            if asked and not loss.closed_curvature:
                raise ValueError(f"{key} needs a loss whose curvature has a closed form, as clip's has; this is loss: {name}")
            if asked and self.fit.train_logit_scale:
                raise ValueError(f"{key} needs a fixed logit scale: leave out fit.train_logit_scale")
        if self.scoring.mode == "forward" and not loss.in_forward_mode:
            raise ValueError(f"scoring.mode: forward knows loss: clip; this is loss: {name}")
        return self

    @model_validator(mode="after")
    def _what_the_targets_can(self) -> Self:
        for asked, key in (
            (self.score.order == 2, "score.order: 2"),
            (self.scoring.mode == "forward", "scoring.mode: forward"),
        ):
            unknown = [name for name, target in self.targets.items() if asked and not target.is_training_loss]
            if unknown:
                raise ValueError(f"{key} needs targets with loss: contrastive, not calibrated; {unknown[0]} is another one")
        if self.scoring.mode == "forward" and self.corpus.uid != "json":
            raise ValueError("scoring.mode: forward knows corpus.uid: json")
        return self

    @model_validator(mode="after")
    def _a_whole_batch_at_least(self) -> Self:
        if self.scoring.mode == "forward" and self.scoring.sample < self.batch_size:
            raise ValueError(
                f"scoring.sample {self.scoring.sample} is below batch_size {self.batch_size}: the curvature needs whole batches"
            )
        return self
