"""The sections of the configuration: the keys, what they mean, and their allowed values."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline import places
from pipeline.kinds import OfKind, find_kind, keys, path_of, refuse

if TYPE_CHECKING:
    from ecif.targets import TargetLoss

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]


def _absolute(place: str, info: ValidationInfo) -> str:
    """A path of a file is relative to the file's folder, which is the context; one from Python to the working directory."""
    return places.absolute(place, (info.context or {}).get("folder", ""))


Place = Annotated[str, AfterValidator(_absolute)]


class Section(BaseModel):
    """A part of the configuration: it can't be changed, and allows no other key."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Pairs(Section):
    """Where image-text pairs are, and how to read them."""

    shards: Place | list[Place] = Field(
        description="WebDataset shards: a folder, a tar, a glob or a brace pattern, or a list of these; paths or fsspec URLs"
    )
    caption: str = Field(
        "txt",
        description="where the caption is: `txt` for the <key>.txt member, a preset (laion, datacomp, coyo, cc12m: .txt, "
        "else the JSON's caption, else the corpus's own field), or a field of <key>.json",
    )


class Corpus(Pairs):
    """The pairs to score, and what img2dataset left beside them."""

    root: Place | None = Field(
        None,
        description="folder above all shards: a shard's name is its path below it; by default the fixed part of the pattern",
    )
    uid: Literal["json", "sidecar"] = Field(
        "json",
        description="where a pair's uid is: <key>.json, or the uid column of <shard>.parquet; a hash where there is none",
    )
    sidecar: list[str] = Field(
        [], description="columns of <shard>.parquet to carry into the score table as sidecar_<column>, joined by key"
    )


class Prompts(Section):
    """Where a target whose images have classes finds its prompts."""

    classes: Place = Field(description="text file, one class name a line, class 0 first")
    templates: Place | None = Field(
        None, description="text file, one template a line with {c} for the class; without it: a photo of a {c}."
    )


class Target(Pairs, OfKind):
    """A clean set, and what the model is asked about it."""

    named_by = "loss"

    loss: str = Field("contrastive", description="what is asked: a kind below, or your own as package.module:Class")

    @classmethod
    def contract(cls) -> "type[TargetLoss]":
        """Kinds of targets."""
        from ecif.targets import TargetLoss

        return TargetLoss

    @property
    def kind(self) -> "type[TargetLoss]":
        """The class."""
        return find_kind(self.contract(), self.loss)

    @classmethod
    def further_keys(cls, kind: Any) -> type[BaseModel]:
        """The options of a kind, and where the prompts of a labelled one are."""
        return keys(kind, Prompts if kind.labelled else None)

    @property
    def prompts(self) -> Prompts | None:
        """Where the prompts of a labelled kind are."""
        given = self.model_extra or {}
        return Prompts.model_validate({key: given[key] for key in Prompts.model_fields}) if self.kind.labelled else None

    @property
    def is_training_loss(self) -> bool:
        """Whether the gradient and the curvature of its loss are known for any parameters."""
        return self.kind.has_curvature and not self.options.get("calibrated")

    @model_validator(mode="after")
    def _captions_or_labels(self) -> Self:
        if self.kind.labelled and self.caption != "txt":
            raise refuse(f"loss {self.loss} reads <key>.cls and no captions: leave out caption")
        return self


class Model(Section):
    """Which open_clip model scores the corpus."""

    name: str = Field(description="an open_clip architecture (ViT-B-32), or local-dir:PATH of an open_clip model folder")
    checkpoint: Place | None = Field(None, description="local .pt (weights only) or .safetensors state dict for it")
    checkpoints: list[Place] = Field([], description="instead: several of this architecture; columns are their mean")

    @field_validator("name")
    @classmethod
    def _absolute_folder(cls, name: str, info: ValidationInfo) -> str:
        return _absolute(name, info) if name.startswith(places.MODEL_FOLDER) else name

    @model_validator(mode="after")
    def _one_or_several(self) -> "Model":
        if self.checkpoint and self.checkpoints:
            raise ValueError("checkpoint and checkpoints: give one of them")
        return self

    def each(self) -> list["Model"]:
        """The model with each of its checkpoints."""
        return [Model(name=self.name, checkpoint=checkpoint) for checkpoint in self.checkpoints] or [self]


class Embed(Section):
    """Decode once, embed once."""

    part_size: PositiveInt = Field(256, description="pairs per feature file; the unit of work of an actor")
    max_pixels: PositiveInt = Field(50_000_000, description="an image with more pixels is quarantined before it is decoded")
    max_member_bytes: PositiveInt = Field(50_000_000, description="a larger image, caption or JSON is quarantined unread")
    max_bad_fraction: float = Field(
        0.2,
        ge=0,
        le=1,
        description="the run ends if a larger share of the pairs can't be used; judged from 10000 pairs on, and at the end",
    )
    max_bad_fraction_of_shard: float = Field(1.0, ge=0, le=1, description="the same, of each shard by itself")


class Fit(Section):
    """Bring the heads to a minimum on this corpus, out of sample for every pair."""

    sample: PositiveInt = Field(65_536, description="pairs to fit and solve on, as whole batches chosen by hash")
    folds: int = Field(5, ge=2, description="K: a pair is scored by heads that were fitted without its fold")
    seeds: PositiveInt = Field(1, description="fits per fold whose scores are averaged")
    epochs: PositiveInt = Field(8, description="passes over the sample; more memorise wrong pairs and make scores poor")
    learning_rate: PositiveFloat = Field(1e-3, description="Adam's, for heads scaled to Frobenius norm sqrt(d)")
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
        if self.checkpoints > self.epochs:
            raise ValueError(f"{self.checkpoints} checkpoints need as many epochs")
        return self


class Solve(Section):
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
    """Which pairs to keep for each target: each half of it asks, both judge the refits; `filter: null` leaves it out."""

    weights: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        min_length=1,
        description="candidates for the weight of influence; misalignment has the rest",
    )
    keep: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.95, 0.9, 0.8, 0.7, 0.6, 0.5], min_length=1, description="candidates: share of the pairs that stay"
    )
    seeds: PositiveInt = Field(1, description="fits of each candidate and half whose losses are averaged")


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
