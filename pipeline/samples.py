"""From the members of a key to a pair that can be embedded, or to a reason why not."""

import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
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
    "bad_label",
    "bad_encoding",
    "bad_json",
    "too_large_member",
    "too_many_pixels",
    "truncated_image",
    "undecodable_image",
    "duplicate_key",
    "truncated_shard",
    "non_finite_features",
]
REASONS: tuple[str, ...] = get_args(Reason)
# What another attempt may not find again: the shard was still being written, the device computed wrongly. All other reasons
# are functions of a pair's bytes.
TRANSIENT: frozenset[str] = frozenset({"truncated_shard", "non_finite_features"})
# Where img2dataset leaves the captions of known corpora: `.txt`, or the JSON field `caption`, which it renames the column of
# the corpus's own metadata to; shards made by other tools keep that column's name. The first place that a pair has counts.
PRESETS = {
    "laion": ("txt", "caption", "TEXT"),
    "datacomp": ("txt", "caption", "text"),
    "coyo": ("txt", "caption", "text"),
    "cc12m": ("txt", "caption"),
}
MAX_CAPTION = 4000  # characters: models read some dozens of tokens, and tokenizers take the square of a word's length
MAX_ASPECT = 200  # resizing makes the short side a few hundred pixels wide: a line of pixels would take gigabytes
_UID = re.compile(r"[0-9a-f]{32}")
_LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")


@dataclass(frozen=True)
class Pair:
    """One decoded pair of a shard."""

    index: int
    key: str
    uid: str
    caption: str
    pixels: NDArray[np.uint8]  # [3, H, W]
    label: int | None = None  # its class, where a dataset has classes


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
    file: BinaryIO,
    group: Group,
    shard: str,
    caption: str,
    limits: Embed,
    resize: Callable[[Any], Any],
    classes: Sequence[str] = (),
    uids: dict[str, str] | None = None,
) -> Pair | Quarantined:
    """Decode one pair.

    Args:
        file: the shard.
        group: the pair's members.
        shard: its name, part of the identity where the JSON has no uid.
        caption: `txt`, a preset, or the JSON field that holds it.
        limits: the caps that are checked before anything is decoded.
        resize: the model's own preprocessing of a PIL image, up to the tensor.
        classes: of a classification dataset, what each is called; a pair's class is the number in its .cls member, and its
            caption the class's name (the layout of clip_benchmark's WebDatasets).
        uids: of the sidecar, by key; None to take them from the JSON.
    """
    known = None if uids is None else {"uid": uids.get(group.key)}
    uid, key = identity(shard, group.key, known or {}), group.key
    try:
        if not _is_unicode(key):
            key = key.encode("utf-8", "backslashreplace").decode()
            raise Refused("bad_encoding", "the member's name is not UTF-8")
        if group.repeated:
            raise Refused("duplicate_key")
        fields = _json(file, group, limits)
        uid = identity(shard, group.key, fields if known is None else known)
        label = _label(file, group, len(classes), limits) if classes else None
        text = _caption(file, group, fields, caption, limits) if label is None else classes[label]
        return Pair(group.index, key, uid, text, _pixels(file, group, limits, resize), label)
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
        raise _undecodable(data, error) from None
    if image.width * image.height > limits.max_pixels:
        raise Refused("too_many_pixels", f"{image.width} x {image.height}")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise Refused("too_many_pixels", f"{image.width} x {image.height}: resizing multiplies them")
    return image


def _pixels(file: BinaryIO, group: Group, limits: Embed, resize: Callable[[Any], Any]) -> NDArray[np.uint8]:
    data = image_bytes(file, group, limits)
    image = open_image(data, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the decoder's remarks on odd files are no news here
            rgb = image.convert("RGB")  # before it is resized, as open_clip's training loader does
            return np.ascontiguousarray(np.asarray(resize(rgb), dtype=np.uint8).transpose(2, 0, 1))
    except Exception as error:  # noqa: BLE001
        raise _undecodable(data, error) from None


def _undecodable(data: bytes, error: Exception) -> Refused:
    """Why a decoder gave up: the image's own end is missing, or something else."""
    if data.startswith(b"\xff\xd8\xff"):
        whole = b"\xff\xd9" in data[max(0, data.rfind(b"\xff\xda")) :]  # JPEG: an end after the last scan's start
    elif data.startswith(b"\x89PNG"):
        whole = b"IEND" in data
    elif data.startswith(b"RIFF"):
        whole = 8 + int.from_bytes(data[4:8], "little") <= len(data)
    else:
        whole = True
    return Refused("undecodable_image" if whole else "truncated_image", f"{type(error).__name__}: {error}")


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
    places = PRESETS.get(caption, (caption,))
    place = next((p for p in places if (p in group.members if p == "txt" else fields.get(p) is not None)), None)
    if place is None:
        raise Refused("missing_caption", " and ".join("no .txt" if p == "txt" else f"no JSON field {p!r}" for p in places))
    text: Any = fields.get(place)
    if place == "txt":
        try:
            text = _read(file, group, "txt", limits).decode()
        except UnicodeDecodeError as error:
            raise Refused("bad_encoding", str(error)) from None
    if not isinstance(text, str):
        raise Refused("missing_caption", f"JSON field {place!r} is no text")
    if not text.strip():
        raise Refused("empty_caption")
    if not _is_unicode(text):
        raise Refused("bad_encoding", "a lone surrogate in the caption")
    return text if len(text) <= MAX_CAPTION else text.strip()[:MAX_CAPTION]


def _label(file: BinaryIO, group: Group, classes: int, limits: Embed) -> int:
    if "cls" not in group.members:
        raise Refused("bad_label", "no .cls member")
    data = _read(file, group, "cls", limits)
    match = _LABEL.fullmatch(data)
    if not match or int(match[1]) >= classes:
        raise Refused("bad_label", f"{data[:50]!r} is no class from 0 to {classes - 1}")
    return int(match[1])


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
