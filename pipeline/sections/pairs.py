"""Sections about pairs: where they are, how they are read, and what is asked about those of a target."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    Field,
    PositiveInt,
    model_serializer,
    model_validator,
)

from pipeline.kinds import OfKind, find_kind, keys, refuse
from pipeline.sections.section import Place, Section

if TYPE_CHECKING:
    from ecif.targets import TargetLoss


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


class Embed(Section):
    """Decode once, embed once."""

    part_size: PositiveInt = Field(256, description="pairs per feature file; the unit of work of an actor")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="of the trunks; auto: bf16 on GPUs (fp16 where they lack it), fp32 on CPUs, and what the run was begun in",
    )
    resize: Literal["exact", "fast"] = Field(
        "exact", description="images as open_clip resizes them; fast: by torch's kernel for bytes, which rounds differently"
    )
    max_pixels: PositiveInt = Field(50_000_000, description="an image with more pixels is quarantined before it is decoded")
    max_member_bytes: PositiveInt = Field(50_000_000, description="a larger image, caption or JSON is quarantined unread")
    max_bad_fraction: float = Field(
        0.2,
        ge=0,
        le=1,
        description="the run ends if a larger share of the pairs can't be used; judged from 10000 pairs on, and at the end",
    )
    max_bad_fraction_of_shard: float = Field(1.0, ge=0, le=1, description="the same, of each shard by itself")
