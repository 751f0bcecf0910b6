"""What every section of the configuration has: no unknown keys, no changes, and paths that are absolute."""

from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
)

from pipeline import places

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]


def absolute(place: str, info: ValidationInfo) -> str:
    """A path of a file is relative to the file's folder, which is the context; one from Python to the working directory."""
    return places.absolute(place, (info.context or {}).get("folder", ""))


Place = Annotated[str, AfterValidator(absolute)]


class Section(BaseModel):
    """A part of the configuration: it can't be changed, and allows no other key."""

    model_config = ConfigDict(extra="forbid", frozen=True)
