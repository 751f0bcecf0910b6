"""Named tuples of tensors on storage: one safetensors object each, with deterministic bytes.

A field may be a tensor, a plain value, another named tuple, or a list of these. The class that is read says which.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import storage

T = TypeVar("T")


def save(url: str, value: Any) -> None:
    """Write a named tuple."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    _flatten("", value, tensors, facts)
    # Copies: safetensors refuses tensors that share memory, as views of one tensor do.
    contiguous = {name: tensors[name].cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)}
    # One metadata entry: safetensors does not keep the order of several.
    metadata = {"facts": json.dumps(facts, sort_keys=True)}
    storage.write_bytes(url, save_tensors(contiguous, metadata=metadata))


def load(url: str, kind: type[T]) -> T:
    """Read a named tuple of this class; FileNotFoundError if it has not been written."""
    tensors, facts = parse(storage.read_bytes(url))
    return _build("", kind, tensors, facts)


def once(url: str, kind: type[T], make: Callable[[], T]) -> T:
    """Read an object that an earlier call wrote, or make it and write it."""
    try:
        return load(url, kind)
    except FileNotFoundError:
        save(url, make())
        return load(url, kind)  # so that this call returns what every later one returns


def parse(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the plain values of an object, by the dotted names of their fields."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load_tensors(data), json.loads(header["__metadata__"]["facts"])


def _flatten(name: str, value: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    if isinstance(value, Tensor):
        tensors[name] = value
    elif hasattr(value, "_fields"):
        for field in value._fields:
            _flatten(f"{name}.{field}".lstrip("."), getattr(value, field), tensors, facts)
    elif isinstance(value, list) and value and (isinstance(value[0], Tensor | list) or hasattr(value[0], "_fields")):
        facts[f"{name}.length"] = len(value)
        for i, item in enumerate(value):
            _flatten(f"{name}.{i}", item, tensors, facts)
    else:
        facts[name] = value


def _build(name: str, kind: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Any:
    if kind is Tensor:
        return tensors[name]
    if hasattr(kind, "_fields"):
        hints = get_type_hints(kind)
        return kind(*(_build(f"{name}.{field}".lstrip("."), hints[field], tensors, facts) for field in kind._fields))
    if get_origin(kind) is list and f"{name}.length" in facts:
        (item,) = get_args(kind)
        return [_build(f"{name}.{i}", item, tensors, facts) for i in range(facts[f"{name}.length"])]
    return facts[name]
