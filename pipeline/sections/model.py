"""Sections about the model: its weights, and how images are prepared for it."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    PlainSerializer,
    PositiveInt,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline import places
from pipeline.sections.section import Place, Section, absolute
from pipeline.urls import masked

Weights = Annotated[Place, PlainSerializer(masked)]  # a URL may hold credentials, which no file gets
Channels = tuple[float, float, float]


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
        return absolute(name, info) if name.startswith(places.MODEL_FOLDER) else name

    @model_validator(mode="after")
    def _one_or_several(self) -> "Model":
        if self.checkpoint and self.checkpoints:
            raise ValueError("checkpoint and checkpoints: give one of them")
        return self

    def each(self) -> list["Model"]:
        """The model with each of its checkpoints."""
        return [self.model_copy(update={"checkpoint": one, "checkpoints": []}) for one in self.checkpoints] or [self]
