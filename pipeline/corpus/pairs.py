"""From the members of a key to a pair that can be embedded, or to a reason why not."""

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import Embed
from pipeline.corpus.captions import is_unicode, read_caption, read_fields, read_label, read_within
from pipeline.corpus.reasons import Reason, Refused
from pipeline.corpus.tar import Group

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
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
    label: int | None = None  # its class, where a dataset has classes


@dataclass(frozen=True)
class Quarantined:
    """A pair that can't be used, and why."""

    index: int
    key: str
    uid: str
    reason: Reason
    detail: str


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
        if not is_unicode(key):
            key = key.encode("utf-8", "backslashreplace").decode()
            raise Refused("bad_encoding", "the member's name is not UTF-8")
        if group.repeated:
            raise Refused("duplicate_key")
        fields = read_fields(file, group, limits)
        uid = identity(shard, group.key, fields if known is None else known)
        label = read_label(file, group, len(classes), limits) if classes else None
        text = read_caption(file, group, fields, caption, limits) if label is None else classes[label]
        return Pair(group.index, key, uid, text, _pixels(file, group, limits, resize), label)
    except Refused as refused:
        return Quarantined(group.index, key, uid, refused.reason, refused.detail)


def image_bytes(file: BinaryIO, group: Group, limits: Embed) -> bytes:
    """The encoded image of a pair; Refused where there is none."""
    suffix = next((s for s in IMAGE_SUFFIXES if s in group.members), None)
    if suffix is None:
        raise Refused("missing_image", f"members: {sorted(group.members)}")
    return read_within(file, group, suffix, limits)


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
