"""Kinds that register themselves: losses, targets, columns, export writers.

A contract is a direct subclass of `Kind`. A subclass of a contract that states a name is found under it:

    class Focal(Loss, name="focal"): ...

A configuration names a kind by that name, or a user's own by its dotted path, `my_package.focal:Focal`, which has to be
importable on every worker.
"""

from dataclasses import Field, field, fields, is_dataclass
from importlib import import_module
from typing import Any, ClassVar, TypeVar

K = TypeVar("K", bound="Kind")
T = TypeVar("T")


class Kind:
    """What contracts have in common."""

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1  # raise it when the same inputs give other numbers: what was computed with it is then redone
    kinds: ClassVar[dict[str, Any]] = {}  # of the contract: every kind by its name, in the order of their definition

    def __init_subclass__(cls, name: str = "", **options: Any) -> None:
        """Register a named subclass of a contract.

        Raises:
            TypeError: another class has the name.
        """
        super().__init_subclass__(**options)
        if Kind in cls.__bases__:
            cls.kinds = {}
        elif name:
            known = cls.kinds.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"{cls.__module__}.{cls.__qualname__}: the name {name!r} belongs to {known.__module__}")
            cls.name = name
            cls.kinds[name] = cls

    @classmethod
    def options(cls) -> list[Field[Any]]:
        """The fields that a configuration may set: of a kind that is a dataclass, those that its constructor takes."""
        return [option for option in fields(cls) if option.init] if is_dataclass(cls) else []


def option(default: T, description: str, **bounds: float) -> T:
    """A field of a kind that is a dataclass. It is a key of the configuration.

    Args:
        default: its value where the configuration does not say.
        description: one line, which `ecif config` prints.
        bounds: `gt`, `ge`, `lt` or `le`, which a value from the configuration has to keep.
    """
    return field(default=default, metadata={"description": description, **bounds})


def find_kind(contract: type[K], name: str) -> type[K]:
    """The kind of a contract that a name or a dotted path stands for.

    Args:
        contract: such as `Loss`.
        name: a registered name, or `package.module:Class`.

    Raises:
        ValueError: there is no such kind; the message lists those that there are.
    """
    what = contract.__name__
    if ":" not in name:
        if name in contract.kinds:
            return contract.kinds[name]
        raise ValueError(f"no {what} {name!r}: there are {', '.join(contract.kinds)}, and your own as package.module:Class")
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{what} {name!r} can't be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, contract)):
        raise ValueError(f"{name!r} is no subclass of {contract.__module__}.{what}")
    return found
