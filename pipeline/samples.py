"""From the members of a key to a pair that can be embedded, or to a reason why not."""

import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import Embed
from pipeline.tar import Group, read_member

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
Reason = Literal[
    "missing_image",
    "missing_caption",
    "empty_caption",
    "bad_encoding",
    "bad_json",
    "too_large_member",
    "too_many_pixels",
    "undecodable_image",
    "duplicate_key",
    "truncated_shard",
    "non_finite_features",
]
REASONS: tuple[str, ...] = get_args(Reason)
MAX_ASPECT = 200  # resizing makes the short side a few hundred pixels wide: a line of pixels would take gigabytes
_UID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Pair:
    """One decoded pair of a shard."""

    index: int
    key: str
    uid: str
    caption: str
    pixels: NDArray[np.uint8]  # [3, H, W]


@dataclass(frozen=True)
class Quarantined:
    """A pair that can't be used, and why."""

    index: int
    key: str
    uid: str
    reason: Reason
    detail: str


class Refused(Exception):
    """A pair is unusable for a reason of the closed list."""

    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail[:300].encode("utf-8", "backslashreplace").decode()


def identity(shard: str, key: str, fields: dict[str, Any]) -> str:
    """The pair's uid: 32 hex digits from its JSON if there, else a hash of (shard, key)."""
    uid = fields.get("uid")
    if isinstance(uid, str) and _UID.fullmatch(uid):
        return uid
    return hashlib.blake2b(f"{shard}/{key}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def read_pair(
    file: BinaryIO, group: Group, shard: str, caption: str, limits: Embed, resize: Callable[[Any], Any]
) -> Pair | Quarantined:
    """Decode one pair.

    Args:
        file: the shard.
        group: the pair's members.
        shard: its name, part of the identity where the JSON has no uid.
        caption: `txt`, or the JSON field that holds it.
        limits: the caps that are checked before anything is decoded.
        resize: the model's own preprocessing of a PIL image, up to the tensor.
    """
    uid, key = identity(shard, group.key, {}), group.key
    try:
        if not _is_unicode(key):
            key = key.encode("utf-8", "backslashreplace").decode()
            raise Refused("bad_encoding", "the member's name is not UTF-8")
        if group.repeated:
            raise Refused("duplicate_key")
        fields = _json(file, group, limits)
        uid = identity(shard, group.key, fields)
        text = _caption(file, group, fields, caption, limits)
        return Pair(group.index, key, uid, text, _pixels(file, group, limits, resize))
    except Refused as refused:
        return Quarantined(group.index, key, uid, refused.reason, refused.detail)


def image_bytes(file: BinaryIO, group: Group, limits: Embed) -> bytes:
    """The encoded image of a pair; Refused where there is none."""
    suffix = next((s for s in IMAGE_SUFFIXES if s in group.members), None)
    if suffix is None:
        raise Refused("missing_image", f"members: {sorted(group.members)}")
    return _read(file, group, suffix, limits)


def caption_of(file: BinaryIO, group: Group, caption: str, limits: Embed) -> str:
    """The caption of a pair; Refused where there is none."""
    return _caption(file, group, _json(file, group, limits), caption, limits)


def open_image(data: bytes, limits: Embed) -> Image.Image:
    """An image whose header was read and whose size is within the limits; nothing is decoded yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap decides, below
            image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"])
    except Image.DecompressionBombError as error:
        raise Refused("too_many_pixels", str(error)) from None
    except Exception as error:  # noqa: BLE001  (a decoder may raise anything on hostile input)
        raise Refused("undecodable_image", f"{type(error).__name__}: {error}") from None
    if image.width * image.height > limits.max_pixels:
        raise Refused("too_many_pixels", f"{image.width} x {image.height}")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise Refused("too_many_pixels", f"{image.width} x {image.height}: resizing multiplies them")
    return image


def _pixels(file: BinaryIO, group: Group, limits: Embed, resize: Callable[[Any], Any]) -> NDArray[np.uint8]:
    image = open_image(image_bytes(file, group, limits), limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the decoder's remarks on odd files are no news here
            return np.ascontiguousarray(np.asarray(resize(image), dtype=np.uint8).transpose(2, 0, 1))
    except Exception as error:  # noqa: BLE001
        raise Refused("undecodable_image", f"{type(error).__name__}: {error}") from None


def _json(file: BinaryIO, group: Group, limits: Embed) -> dict[str, Any]:
    if "json" not in group.members:
        return {}
    try:
        fields = json.loads(_read(file, group, "json", limits))
    except (ValueError, RecursionError) as error:
        raise Refused("bad_json", str(error)) from None
    if not isinstance(fields, dict):
        raise Refused("bad_json", f"a {type(fields).__name__}, not an object")
    return fields


def _caption(file: BinaryIO, group: Group, fields: dict[str, Any], caption: str, limits: Embed) -> str:
    text: Any
    if caption == "txt":
        if "txt" not in group.members:
            raise Refused("missing_caption", "no .txt member")
        try:
            text = _read(file, group, "txt", limits).decode()
        except UnicodeDecodeError as error:
            raise Refused("bad_encoding", str(error)) from None
    else:
        text = fields.get(caption)
        if not isinstance(text, str):
            raise Refused("missing_caption", f"no text in JSON field {caption!r}")
    if not text.strip():
        raise Refused("empty_caption")
    if not _is_unicode(text):
        raise Refused("bad_encoding", "a lone surrogate in the caption")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(file: BinaryIO, group: Group, suffix: str, limits: Embed) -> bytes:
    member = group.members[suffix]
    if member.size > limits.max_member_bytes:
        raise Refused("too_large_member", f".{suffix}: {member.size} bytes")
    try:
        return read_member(file, member)
    except EOFError as error:
        raise Refused("truncated_shard", str(error)) from None
