"""Kinds in a configuration, such as losses and targets: the class that a name stands for, and the keys of that class.

The options of a kind are its dataclass fields. Its capabilities are attributes of its class. So a new kind brings its own keys,
and no list of names is kept here. `ecif` takes seconds to import, so it is imported when a configuration is read.
"""

from collections.abc import Mapping
from dataclasses import MISSING
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, create_model, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

if TYPE_CHECKING:
    from ecif.losses import Loss
    from ecif.registry import Kind

K = TypeVar("K", bound="Kind")


class OfKind(BaseModel):
    """A section of the configuration that names a kind. Its further keys belong to that kind; no other ones are allowed."""

    model_config = ConfigDict(extra="allow", frozen=True)

    named_by: ClassVar[str]  # the key with the kind's name

    @classmethod
    def contract(cls) -> "type[Kind]":
        """The class that all kinds are subclasses of."""
        raise NotImplementedError

    @classmethod
    def further_keys(cls, kind: Any) -> type[BaseModel]:
        """The section that holds the keys of one kind alone."""
        return keys(kind)

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """The kinds that have a name, by name."""
        return cls.contract().kinds

    @property
    def kind(self) -> "type[Kind]":
        """The class."""
        return find_kind(self.contract(), getattr(self, self.named_by))

    @property
    def options(self) -> dict[str, Any]:
        """The options of the kind, as its class takes them."""
        given = self.model_extra or {}
        kind: Any = self.kind  # a class is hashable, which mypy denies
        names = [option.name for option in kind.options()]
        own = keys(kind).model_validate({name: given[name] for name in names})
        return {name: getattr(own, name) for name in names}

    def question(self) -> dict[str, Any]:
        """Plain values for a fingerprint: all that the kind's results depend on, beside the tensors that it is given."""
        kind, given = self.kind, self.model_extra or {}
        options = {option.name: given[option.name] for option in kind.options()}
        return {"kind": getattr(self, self.named_by), "version": kind.version, "options": options}

    @model_validator(mode="before")
    @classmethod
    def _with_the_keys_of_its_kind(cls, given: Any, info: ValidationInfo) -> Any:
        """Fill in every key of the kind, so that the record of a run does not depend on later defaults."""
        short = isinstance(given, str)
        given = {cls.named_by: given} if short else given
        field = cls.model_fields[cls.named_by]
        if not isinstance(given, Mapping) or not isinstance(name := given.get(cls.named_by, field.default), str):
            return given
        kind = find_kind(cls.contract(), name, *([] if short else [cls.named_by]))
        further = {key: value for key, value in given.items() if key not in cls.model_fields}
        own = cls.further_keys(kind).model_validate(further, context=info.context)
        return {**given, cls.named_by: path_of(kind), **own.model_dump(mode="json")}


class TrainingLoss(OfKind):
    """What the model is trained with. The heads are fitted to it, and influence is in its units."""

    named_by = "name"

    name: str = Field(description="a kind below, or your own as package.module:Class; `loss: NAME` is short for a name alone")

    @classmethod
    def contract(cls) -> "type[Loss]":
        """Losses."""
        from ecif.losses import Loss

        return Loss

    @property
    def kind(self) -> "type[Loss]":
        """The class."""
        return find_kind(self.contract(), self.name)

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """The losses that a run can have."""
        return {name: kind for name, kind in super().kinds().items() if kind.two_tower}

    def build(self, **more: Any) -> "Loss":
        """The loss.

        Args:
            more: fields of its class that are not keys of this section.
        """
        return self.kind(**self.options, **more)

    @model_validator(mode="after")
    def _of_two_towers(self) -> Self:
        if not self.kind.two_tower:
            raise refuse(f"{self.name} is a loss over several views, for use from Python: a run's model has two towers")
        self.build()  # which checks the options as a whole
        return self


def find_kind(contract: type[K], name: str, *key: str) -> type[K]:
    """The kind that a name or a dotted path stands for.

    Args:
        contract: such as `Loss`.
        name: what the configuration says.
        key: the key that says so, for the error.

    Raises:
        ValidationError: there is no such kind, or it can't be used; one line says why.
    """
    from ecif import registry

    try:
        kind = registry.find_kind(contract, name)
    except ValueError as error:
        raise refuse(str(error), *key) from None
    if missing := sorted(getattr(kind, "__abstractmethods__", [])):
        raise refuse(f"{name!r} does not define {', '.join(missing)}", *key)
    if kind.__module__ == "__main__":
        raise refuse(f"{name!r} is defined in a script or notebook: move it to a module, which workers can import", *key)
    return kind


def path_of(kind: "type[Kind]") -> str:
    """The name under which every process finds a kind. Workers know only the names that `ecif` registers."""
    return kind.name if kind.__module__.startswith("ecif.") else f"{kind.__module__}:{kind.__qualname__}"


@cache
def keys(kind: Any, base: type[BaseModel] | None = None) -> type[BaseModel]:
    """A section of the configuration with the options of a kind. It allows no other key.

    Args:
        kind: a class; its dataclass fields become keys, see `ecif.registry.option`.
        base: a section with more keys.
    """
    hints = get_type_hints(kind, include_extras=True)
    own: dict[str, Any] = {}
    for option in kind.options():
        how: dict[str, Any] = dict(option.metadata)
        if option.default is not MISSING:
            how["default"] = option.default
        if option.default_factory is not MISSING:
            how["default_factory"] = option.default_factory
        own[option.name] = (hints[option.name], Field(**how))
    config = ConfigDict(extra="forbid", frozen=True)
    return create_model(kind.__name__, **({"__base__": base} if base else {"__config__": config}), **own)


def refuse(message: str, *key: str) -> ValidationError:
    """An error to raise in a validator, about a key of its section, or about the section itself."""
    error = PydanticCustomError("kind", "{message}", {"message": message})
    return ValidationError.from_exception_data("configuration", [InitErrorDetails(type=error, loc=key, input=None)])
