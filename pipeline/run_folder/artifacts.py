"""What a run writes: the names of its objects."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

FORMAT = 4  # raise it with every change of what is computed: objects of another format are never taken for this one's


def fingerprint(*parts: Any) -> str:
    """16 hex digits of everything that an output depends on, the format of this version's objects included."""
    plain: Callable[[Any], Any] = lambda value: value.model_dump() if isinstance(value, BaseModel) else str(value)  # noqa: E731
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True, default=plain).encode()).hexdigest()[:16]
