"""The uid of a pair: 32 hex digits, as DataComp has them. The uids of many pairs are packed, 16 bytes each."""

import hashlib
import re
from binascii import unhexlify
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

PACKED = np.dtype("S16")  # a uid as its bytes: sorted as its digits are
_SPELLING = re.compile(r"(?:urn:uuid:)?(\{)?([0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?(1)\})", re.IGNORECASE)


class Uid(NamedTuple):
    """The uid of a pair, and whether it is the pair's own."""

    text: str  # 32 lower-case hex digits
    replaced: str | None = None  # what the pair had instead: empty if it had none, None if `text` is its own


class Uids(NamedTuple):
    """What is known about the uids of some pairs."""

    pairs: int = 0
    without: int = 0  # pairs that have none, and got a hash of shard and key
    other: int = 0  # pairs whose uid is not 32 hex digits, and was replaced by that hash
    example: str = ""  # of these
    repeated: int = 0  # pairs whose uid other pairs have too
    shared: str = ""  # an example of such a uid

    def said(self, pairs: str = "pairs") -> list[str]:
        """What a user has to know about them, a line each; `pairs` is what to call them."""
        lines = []
        if self.other:
            lines.append(
                f"{self.other} of {self.pairs} {pairs} have a uid that is not 32 hex digits, such as {self.example}: a hash of "
                "shard and key replaces it, which joins with nothing of yours"
            )
        if self.without:
            lines.append(
                f"{self.without} of {self.pairs} {pairs} have no uid: they get a hash of shard and key, which other programs "
                "do not know (`ecif select --format keys` writes shard and key)"
            )
        if self.repeated:
            lines.append(
                f"{self.repeated} of {self.pairs} {pairs} share their uid with others, such as {self.shared}: shard and key "
                "say which pair is meant (`ecif select --format keys`)"
            )
        return lines


def uid_of(shard: str, key: str, given: Any) -> Uid:
    """The uid of a pair.

    Args:
        shard: name of its shard.
        key: its key.
        given: what its JSON or sidecar has as `uid`; None if nothing. 32 hex digits count in any case, and as a UUID: with
            dashes, in braces, after `urn:uuid:`.
    """
    match = _SPELLING.fullmatch(given.strip()) if isinstance(given, str) else None
    if match:
        return Uid(match[2].replace("-", "").lower())
    made_up = hashlib.blake2b(f"{shard}/{key}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return Uid(made_up, "" if given is None else str(given).strip()[:100])


class UidCounter:
    """Counts the pairs of a shard whose uid is not their own."""

    def __init__(self, shard: str):
        self.shard, self.without, self.other, self.example = shard, 0, 0, ""

    def add(self, key: str, replaced: str | None) -> None:
        """Count a pair: its key, and `Uid.replaced`."""
        if replaced == "":
            self.without += 1
        elif replaced is not None:
            self.other += 1
            self.example = self.example or f"{replaced!r} ({self.shard}, {key.encode('utf-8', 'backslashreplace').decode()})"


def pack(uids: Sequence[str]) -> NDArray[np.bytes_]:
    """[N] S16 of uids."""
    return np.frombuffer(bytearray.fromhex("".join(uids)), PACKED)


def pack_column(uids: pa.ChunkedArray) -> NDArray[np.bytes_]:
    """[N] S16 of a column of uids. No Python string is made of any of them.

    Raises:
        pa.ArrowInvalid: a uid has not 32 characters.
        binascii.Error: one has other characters than hex digits.
    """
    digits = (chunk.cast(pa.binary(32)) for chunk in uids.chunks)
    halves = (memoryview(of.buffers()[1])[32 * of.offset : 32 * (of.offset + len(of))] for of in digits if len(of))
    return np.frombuffer(bytearray().join(map(unhexlify, halves)), PACKED)


def unpack(packed: NDArray[np.bytes_]) -> list[str]:
    """The inverse of `pack`."""
    digits = np.ascontiguousarray(packed).tobytes().hex()
    return [digits[i : i + 32] for i in range(0, len(digits), 32)]


def repeats(packed: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    """The uids that are there more than once, as often as they are, sorted. Sorts `packed` in place, to take no more memory."""
    packed.sort()
    same = packed[1:] == packed[:-1]
    edge = np.zeros(1, bool)
    return packed[np.concatenate([same, edge]) | np.concatenate([edge, same])] if len(packed) else packed
