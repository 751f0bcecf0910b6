"""Decode the members of a key to a pair that can be embedded, or find the reason why that is not possible."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.captions import is_unicode, read_caption, read_fields, read_label, read_within
from pipeline.corpus.images import Resize, read_pixels
from pipeline.corpus.reasons import Reason, Refused
from pipeline.corpus.tar import IMAGE_SUFFIXES, Group
from pipeline.corpus.uids import Uid, uid_of
from pipeline.sections import Embed, Reading


@dataclass(frozen=True)
class Pair:
    """One decoded pair of a shard."""

    index: int
    key: str
    uid: str
    caption: str
    pixels: NDArray[np.uint8]  # [H, W, 3]
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
    resize: Resize  # the model's own preprocessing of an image, up to the tensor
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
        pixels, digest = read_pixels(data, limits, rules.resize), hashlib.blake2b(data, digest_size=16).hexdigest()
        return Pair(group.index, key, uid.text, text, pixels, digest, label, uid.replaced)
    except Refused as refused:
        return Quarantined(group.index, key, uid.text, refused.reason, refused.detail)


def image_bytes(file: BinaryIO, group: Group, limits: Embed) -> bytes:
    """The encoded image of a pair. Raises Refused if it has none."""
    suffix = next((s for s in IMAGE_SUFFIXES if s in group.members), None)
    if suffix is None:
        raise Refused("missing_image", f"members: {sorted(group.members)}")
    return read_within(file, group, suffix, limits)
