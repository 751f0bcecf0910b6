"""Decode the members of a key to a pair that can be embedded, or find the reason why that is not possible."""

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.corpus.captions import is_unicode, read_caption, read_fields, read_label, read_within
from pipeline.corpus.reasons import Reason, Refused
from pipeline.corpus.signatures import signature
from pipeline.corpus.tar import IMAGE_SUFFIXES, Group
from pipeline.corpus.uids import Uid, uid_of
from pipeline.sections import Embed, Reading

MAX_ASPECT = 200  # resizing scales the short side to a few hundred pixels: a thin line would grow to gigabytes
IMAGES = ("JPEG", "PNG", "WebP")  # formats that are read, as `signature` calls them


@dataclass(frozen=True)
class Pair:
    """One decoded pair of a shard."""

    index: int
    key: str
    uid: str
    caption: str
    pixels: NDArray[np.uint8]  # [3, H, W]
    image_hash: str  # 32 hex digits: BLAKE2b of the bytes of the image
    label: int | None = None  # its class, if the dataset has classes
    replaced: str | None = None  # see `Uid.replaced`


@dataclass(frozen=True)
class Quarantined:
    """A pair that can't be used, and why."""

    index: int
    key: str
    uid: str
    reason: Reason
    detail: str


class ReadingRules(NamedTuple):
    """How the pairs of a shard are read."""

    shard: str  # its name; a pair without a uid in its JSON gets one from it
    reading: Reading  # where its captions are
    limits: Embed  # limits that are checked before anything is decoded
    resize: Callable[[Any], Any]  # the model's own preprocessing of a PIL image, up to the tensor
    # A caption for each class of a classification dataset, else empty. The class of a pair is the number in its .cls member
    # (the layout of clip_benchmark's WebDatasets).
    classes: Sequence[str] = ()
    uids: dict[str, str | None] | None = None  # by key, from the sidecar; None to take them from the JSON

    def uid(self, key: str, fields: dict[str, Any]) -> Uid:
        """The uid of a pair, given the fields of its JSON."""
        return uid_of(self.shard, key, fields.get("uid") if self.uids is None else self.uids.get(key))


def read_pair(file: BinaryIO, group: Group, rules: ReadingRules) -> Pair | Quarantined:
    """Decode one pair. All captions of an image have the uid of the image: they are one thing in folds and halves.

    Args:
        file: the shard.
        group: the pair's members.
        rules: how to read it.
    """
    limits = rules.limits
    uid, key = rules.uid(group.key, {}), group.pair_key
    try:
        if not is_unicode(key):
            key = key.encode("utf-8", "backslashreplace").decode()
            raise Refused("bad_encoding", "the member's name is not UTF-8")
        if group.repeated:
            raise Refused("duplicate_key")
        fields = read_fields(file, group, limits)
        uid = rules.uid(group.key, fields)
        label = read_label(file, group, len(rules.classes), limits) if rules.classes else None
        text = read_caption(file, group, fields, rules.reading, limits) if label is None else rules.classes[label]
        data = image_bytes(file, group, limits)
        pixels, digest = _pixels(data, limits, rules.resize), hashlib.blake2b(data, digest_size=16).hexdigest()
        return Pair(group.index, key, uid.text, text, pixels, digest, label, uid.replaced)
    except Refused as refused:
        return Quarantined(group.index, key, uid.text, refused.reason, refused.detail)


def image_bytes(file: BinaryIO, group: Group, limits: Embed) -> bytes:
    """The encoded image of a pair. Raises Refused if it has none."""
    suffix = next((s for s in IMAGE_SUFFIXES if s in group.members), None)
    if suffix is None:
        raise Refused("missing_image", f"members: {sorted(group.members)}")
    return read_within(file, group, suffix, limits)


def open_image(data: bytes, limits: Embed) -> Image.Image:
    """Open an image by its header. No pixel is decoded. Raises Refused if the image is larger than the limits allow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides below
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


def _pixels(data: bytes, limits: Embed, resize: Callable[[Any], Any]) -> NDArray[np.uint8]:
    image = open_image(data, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd files that are decoded all the same
            rgb = image.convert("RGB")  # before the resize, as in open_clip's training loader
            return np.ascontiguousarray(np.asarray(resize(rgb), dtype=np.uint8).transpose(2, 0, 1))
    except Exception as error:  # noqa: BLE001
        raise _undecodable(data, error) from None


def _undecodable(data: bytes, error: Exception) -> Refused:
    """The reason why a decoder gave up: it is no image that is read, its end is missing, or something else is wrong."""
    kind = signature(data)
    if kind not in IMAGES:
        return Refused("undecodable_image", f"{kind}, not {', '.join(IMAGES[:-1])} or {IMAGES[-1]}")
    if kind == "JPEG":
        whole = b"\xff\xd9" in data[max(0, data.rfind(b"\xff\xda")) :]  # JPEG: an end after the last scan's start
    elif kind == "PNG":
        whole = b"IEND" in data
    else:
        whole = 8 + int.from_bytes(data[4:8], "little") <= len(data)
    # Errors of decoders are of their own making. One that shows an object shows its address, another one in each run.
    text = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))
    return Refused("undecodable_image" if whole else "truncated_image", f"{kind}: {type(error).__name__}: {text}")
