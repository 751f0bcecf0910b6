"""Kinds that register themselves: losses, targets, columns, export writers.

A contract is a direct subclass of `Kind`, such as `Loss`. A kind is a subclass of a contract that states a name. It is then
found under this name:

    class Focal(Loss, name="focal"): ...

A configuration refers to a kind by its name, or to a user's own kind by its dotted path, `my_package.focal:Focal`. The package
has to be importable on every worker.
"""

from dataclasses import Field, field, fields, is_dataclass
from importlib import import_module
from typing import Any, ClassVar, TypeVar

K = TypeVar("K", bound="Kind")
T = TypeVar("T")


class Kind:
    """The base class of all contracts."""

    name: ClassVar[str] = ""  # the name in a configuration
    version: ClassVar[int] = 1  # raise it when the same inputs give other numbers: a run then recomputes its results
    kinds: ClassVar[dict[str, Any]] = {}  # every kind of the contract by its name, in the order of definition

    def __init_subclass__(cls, name: str = "", **options: Any) -> None:
        """Register a named subclass of a contract.

        Raises:
            TypeError: another class of the contract has the name.
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
        """The fields that a configuration may set: those of a dataclass that its constructor takes. Other classes have none."""
        return [option for option in fields(cls) if option.init] if is_dataclass(cls) else []


def option(default: T, description: str, **bounds: float) -> T:
    """A field of a kind that is a dataclass. It becomes a key of the configuration.

    Args:
        default: its value if the configuration has no such key.
        description: one line, which `ecif config` prints.
        bounds: `gt`, `ge`, `lt` or `le`: bounds on a value from the configuration.
    """
    return field(default=default, metadata={"description": description, **bounds})


def find_kind(contract: type[K], name: str) -> type[K]:
    """Find a kind of a contract by its name or its dotted path.

    Args:
        contract: the contract, such as `Loss`.
        name: a registered name, or `package.module:Class`.

    Raises:
        ValueError: no kind has the name (the message lists all names), or the dotted path can't be imported or names no
            subclass of the contract.
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
