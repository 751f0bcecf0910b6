"""The sections of the configuration: the keys, what they mean, and their allowed values."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from pipeline import places
from pipeline.kinds import OfKind, find_kind, keys, path_of, refuse
from pipeline.urls import masked

if TYPE_CHECKING:
    from ecif.targets import TargetLoss

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]


def _absolute(place: str, info: ValidationInfo) -> str:
    """A path of a file is relative to the file's folder, which is the context; one from Python to the working directory."""
    return places.absolute(place, (info.context or {}).get("folder", ""))


Place = Annotated[str, AfterValidator(_absolute)]
Weights = Annotated[Place, PlainSerializer(masked)]  # a URL may hold credentials, which no file gets
Channels = tuple[float, float, float]


class Section(BaseModel):
    """A part of the configuration: it can't be changed, and allows no other key."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Caption(Section):
    """Where the caption of a pair is. `caption: NAME` is short for a field alone."""

    field: str = Field(
        "txt",
        description="`txt` for the <key>.txt member, another member by its suffix (caption.txt, 0.txt, .text), a preset "
        "(laion, datacomp, coyo, cc12m: .txt, else the JSON's caption, else the corpus's own field), or a field of <key>.json",
    )
    pick: Literal["first", "all"] | None = Field(
        None,
        description="where several captions are: each line of a text, each item of a JSON list. `first` takes the first, `all` "
        "makes a pair of each; by default a text is one caption and a list is refused",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_name(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"field": given}
        if not isinstance(given, dict | Caption):
            raise ValueError("the name of a field, or {field: NAME, pick: first}, or pick: all")
        return given

    @model_serializer(mode="wrap")
    def _short(self, dump: Callable[[Any], dict[str, Any]]) -> Any:
        """A field alone is recorded as its name."""
        return dump(self) if self.pick else self.field


class Reading(NamedTuple):
    """How the members of a shard become pairs with captions."""

    caption: str = "txt"  # see `Caption.field`
    pick: Literal["first", "all"] | None = None
    key: Literal["first_dot", "last_dot"] = "first_dot"

    def named(self) -> Any:
        """A plain value for a fingerprint. What came after version 0.2 is left out at its default, so that names stay."""
        return self.caption if self == Reading(self.caption) else list(self)


class Pairs(Section):
    """Where image-text pairs are, and how to read them."""

    shards: Place | list[Place] = Field(
        description="WebDataset shards: a folder, a tar, a glob or a brace pattern, or a list of these; paths or fsspec URLs"
    )
    missing: Literal["refuse", "skip"] = Field(
        "refuse",
        description="shards that are named and not there, as in a gap of a brace pattern: refuse to start, or say and skip",
    )
    key: Literal["first_dot", "last_dot"] = Field(
        "first_dot",
        description="where the key ends in a member's file name: at the first dot, as for trainers, or at the last "
        "(img.v2.jpg and img.v2.txt are the pair img.v2)",
    )
    caption: Caption = Caption()

    @property
    def reading(self) -> Reading:
        """How the members of a shard become pairs with captions."""
        return Reading(self.caption.field, self.caption.pick, self.key)


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

    @model_validator(mode="after")
    def _columns_of_images(self) -> Self:
        if self.sidecar and self.caption.pick == "all":
            raise refuse("corpus.sidecar has a row for an image, and caption.pick: all a pair for a caption: leave one out")
        return self


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
        if self.kind.labelled and self.caption != Caption():
            raise refuse(f"loss {self.loss} reads <key>.cls and no captions: leave out caption")
        return self


class Preprocess(Section):
    """How images are prepared, as `preprocess_cfg` of an open_clip model folder says it; what is left out is the tag's."""

    mean: Channels | None = Field(None, description="of red, green and blue, which is subtracted")
    std: Channels | None = Field(None, description="of red, green and blue, which is divided by")
    interpolation: Literal["bicubic", "bilinear"] | None = Field(None, description="of resizing")
    resize_mode: Literal["shortest", "longest", "squash"] | None = Field(
        None, description="shortest edge and crop, longest edge and fill, or squash"
    )
    fill_color: int | None = Field(None, ge=0, le=255, description="of what longest fills")
    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(None, description="has to be the model's own")
    mode: Literal["RGB"] | None = Field(None, description="every model's")


class Model(Section):
    """Which open_clip model scores the corpus."""

    name: str = Field(description="an open_clip architecture (ViT-B-32), or local-dir:PATH of an open_clip model folder")
    checkpoint: Weights | None = Field(
        None, repr=False, description="its weights, a path or an fsspec URL: .pt (weights only), .safetensors or TorchScript"
    )
    checkpoints: list[Weights] = Field(
        [], repr=False, description="instead: several of this architecture; columns are their mean"
    )
    pretrained_cfg: str | None = Field(
        None,
        description="open_clip's tag that says how an architecture's weights were trained (preprocessing, activation), or "
        "`default` for your own trained with open_clip's defaults; needed where the tags of the architecture differ",
    )
    preprocess: Preprocess | None = Field(None, description="parts of the preprocessing that differ from the tag's")
    _sha256: str | None = PrivateAttr(None)

    @property
    def sha256(self) -> str | None:
        """The hash that the file of weights has to have. Only a process that was given the model has one."""
        return self._sha256

    def pinned(self, sha256: str | None) -> "Model":
        """The model with weights of this hash and no others: processes that get it refuse them."""
        same = self.model_copy()
        same._sha256 = sha256
        return same

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
        return [self.model_copy(update={"checkpoint": one, "checkpoints": []}) for one in self.checkpoints] or [self]


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
