"""Where a pair's text is: the caption, the JSON's fields, the label of a classification dataset."""

import json
import re
from typing import Any, BinaryIO

from pipeline.config import Embed
from pipeline.corpus.reasons import Refused
from pipeline.corpus.tar import Group, read_member

# Where img2dataset leaves the captions of known corpora: `.txt`, or the JSON field `caption`, which it renames the column of
# the corpus's own metadata to; shards made by other tools keep that column's name. The first place that a pair has counts.
PRESETS = {
    "laion": ("txt", "caption", "TEXT"),
    "datacomp": ("txt", "caption", "text"),
    "coyo": ("txt", "caption", "text"),
    "cc12m": ("txt", "caption"),
}
MAX_CAPTION = 4000  # characters: models read some dozens of tokens, and tokenizers take the square of a word's length
LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")


def caption_of(file: BinaryIO, group: Group, caption: str, limits: Embed) -> str:
    """The caption of a pair; Refused where there is none."""
    return read_caption(file, group, read_fields(file, group, limits), caption, limits)


def read_caption(file: BinaryIO, group: Group, fields: dict[str, Any], caption: str, limits: Embed) -> str:
    """The caption, from the first of its places that the pair has; Refused where that is no text."""
    places = PRESETS.get(caption, (caption,))
    place = next((p for p in places if (p in group.members if p == "txt" else fields.get(p) is not None)), None)
    if place is None:
        raise Refused("missing_caption", " and ".join("no .txt" if p == "txt" else f"no JSON field {p!r}" for p in places))
    text: Any = fields.get(place)
    if place == "txt":
        try:
            text = read_within(file, group, "txt", limits).decode()
        except UnicodeDecodeError as error:
            raise Refused("bad_encoding", str(error)) from None
    if not isinstance(text, str):
        raise Refused("missing_caption", f"JSON field {place!r} is no text")
    if not text.strip():
        raise Refused("empty_caption")
    if not is_unicode(text):
        raise Refused("bad_encoding", "a lone surrogate in the caption")
    return text if len(text) <= MAX_CAPTION else text.strip()[:MAX_CAPTION]


def read_fields(file: BinaryIO, group: Group, limits: Embed) -> dict[str, Any]:
    """The fields of <key>.json, none where there is no such member; Refused where it is no object."""
    if "json" not in group.members:
        return {}
    try:
        fields = json.loads(read_within(file, group, "json", limits))
    except (ValueError, RecursionError) as error:
        raise Refused("bad_json", str(error)) from None
    if not isinstance(fields, dict):
        raise Refused("bad_json", f"a {type(fields).__name__}, not an object")
    return fields


def read_label(file: BinaryIO, group: Group, classes: int, limits: Embed) -> int:
    """The class in <key>.cls; Refused where it is none."""
    if "cls" not in group.members:
        raise Refused("bad_label", "no .cls member")
    data = read_within(file, group, "cls", limits)
    match = LABEL.fullmatch(data)
    if not match or int(match[1]) >= classes:
        raise Refused("bad_label", f"{data[:50]!r} is no class from 0 to {classes - 1}")
    return int(match[1])


def read_within(file: BinaryIO, group: Group, suffix: str, limits: Embed) -> bytes:
    """A member whose size is within the limits; Refused otherwise."""
    member = group.members[suffix]
    if member.size > limits.max_member_bytes:
        raise Refused("too_large_member", f".{suffix}: {member.size} bytes")
    try:
        return read_member(file, member)
    except EOFError as error:
        raise Refused("truncated_shard", str(error)) from None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
