"""The one configuration of a run: typed, validated before anything starts, explained by its own descriptions."""

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]


def _absolute(place: str) -> str:
    """A local path made absolute: workers, and later commands, have other working directories. URLs stay as they are."""
    scheme, colon, path = place.rpartition("local-dir:")
    return place if "://" in place else f"{scheme}{colon}{os.path.abspath(path)}"


Place = Annotated[str, AfterValidator(_absolute)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pairs(_Section):
    """Where image-text pairs are, and how to read them."""

    shards: Place | list[Place] = Field(
        description="WebDataset shards: a folder, a tar, a glob or a brace pattern, or a list of these; paths or fsspec URLs"
    )
    caption: str = Field(
        "txt",
        description="where the caption is: `txt` for the <key>.txt member, else a field of <key>.json (caption, TEXT, ...)",
    )


class Model(_Section):
    """Which open_clip model scores the corpus."""

    name: str = Field(description="an open_clip architecture (ViT-B-32), or local-dir:PATH of an open_clip model folder")
    checkpoint: Place | None = Field(None, description="local .pt (weights only) or .safetensors state dict for it")

    @field_validator("name")
    @classmethod
    def _absolute_folder(cls, name: str) -> str:
        return _absolute(name) if name.startswith("local-dir:") else name


class Embed(_Section):
    """Decode once, embed once."""

    part_size: PositiveInt = Field(256, description="pairs per feature file; the unit of work of an actor")
    max_pixels: PositiveInt = Field(50_000_000, description="an image with more pixels is quarantined before it is decoded")
    max_member_bytes: PositiveInt = Field(50_000_000, description="a larger image, caption or JSON is quarantined unread")


class Fit(_Section):
    """Bring the heads to a minimum on this corpus, out of sample for every pair."""

    sample: PositiveInt = Field(65_536, description="pairs to fit and solve on, as whole batches chosen by hash")
    folds: int = Field(5, ge=2, description="K: a pair is scored by heads that were fitted without its fold")
    seeds: PositiveInt = Field(1, description="fits per fold whose scores are averaged")
    epochs: PositiveInt = Field(4, description="passes over the sample; more memorise wrong pairs and make scores poor")
    learning_rate: PositiveFloat = Field(3e-3, description="Adam's, for heads scaled to Frobenius norm sqrt(d)")


class Solve(_Section):
    """The shared inverse-Hessian system."""

    iterations: PositiveInt = Field(
        24, description="conjugate gradient steps; each is one Gauss-Newton product over the sample"
    )
    refits: int = Field(16, ge=4, description="real refits without random pairs that the damping is calibrated against")
    dampings: list[PositiveFloat] = Field(
        [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
        min_length=1,
        description="candidates, in units of the curvature's largest eigenvalue; one value switches the choice off",
    )
    target_batch: int = Field(50, ge=2, description="target pairs that share a softmax in the target's loss")


class Score(_Section):
    """Columns from features."""

    repeats: PositiveInt = Field(4, description="permutations of the batches that scores are averaged over")
    negative: Literal["exact", "taylor"] = Field("exact", description="exact -log(1 - P), or the paper's first-order form")


class Config(_Section):
    """A run: corpus in, influence columns out."""

    run: Place = Field(description="folder of this run, a path or an fsspec URL; the same command resumes what is there")
    corpus: Pairs
    model: Model
    targets: dict[Name, Pairs] = Field(min_length=1, description="named clean sets: whose improvement counts")
    batch_size: int = Field(256, ge=2, description="pairs that share a softmax; use the batch size you train with, if it fits")
    seed: int = Field(0, ge=0, description="of batches, folds and fits")
    workers: PositiveInt | None = Field(None, description="actors; by default one a GPU, or one a CPU core where there is none")
    embed: Embed = Embed()
    fit: Fit = Fit()
    solve: Solve = Solve()
    score: Score = Score()

    @field_validator("targets")
    @classmethod
    def _in_one_order(cls, targets: dict[str, Pairs]) -> dict[str, Pairs]:
        """By name, whatever the order in the file: directions hold targets by position."""
        for name in targets:
            if name.startswith(("positive", "negative")):
                raise ValueError(f"target name {name!r} would collide with the influence_positive/negative columns")
        return dict(sorted(targets.items()))
