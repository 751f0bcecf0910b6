"""Read the text of a pair: its caption, the fields of its JSON, or the label of a classification dataset."""

import json
import re
from typing import Any, BinaryIO

from pipeline.corpus.reasons import Refused
from pipeline.corpus.tar import Group, read_member
from pipeline.sections import Embed

# Where the captions of known corpora are. img2dataset writes `.txt` and the JSON field `caption`. Other tools keep the name of
# the column in the corpus's own metadata. The first of these places that a pair has counts.
PRESETS = {
    "laion": ("txt", "caption", "TEXT"),
    "datacomp": ("txt", "caption", "text"),
    "coyo": ("txt", "caption", "text"),
    "cc12m": ("txt", "caption"),
}
MAX_CAPTION = 4000  # characters; models read dozens of tokens, and a tokenizer takes the square of a word's length
LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")


def caption_of(file: BinaryIO, group: Group, caption: str, limits: Embed) -> str:
    """The caption of a pair. Raises Refused if it has none."""
    return read_caption(file, group, read_fields(file, group, limits), caption, limits)


def read_caption(file: BinaryIO, group: Group, fields: dict[str, Any], caption: str, limits: Embed) -> str:
    """The caption, from the first of its places that the pair has. Raises Refused if that is no text."""
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
    """The fields of <key>.json, empty without that member. Raises Refused if it holds no JSON object."""
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
    """The class in <key>.cls. Raises Refused if it is none of the classes."""
    if "cls" not in group.members:
        raise Refused("bad_label", "no .cls member")
    data = read_within(file, group, "cls", limits)
    match = LABEL.fullmatch(data)
    if not match or int(match[1]) >= classes:
        raise Refused("bad_label", f"{data[:50]!r} is no class from 0 to {classes - 1}")
    return int(match[1])


def read_within(file: BinaryIO, group: Group, suffix: str, limits: Embed) -> bytes:
    """The bytes of a member. Raises Refused if it is larger than the limits allow."""
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
