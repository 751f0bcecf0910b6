"""Read the text of a pair: its caption, the fields of its JSON, or the label of a classification dataset."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from pipeline.corpus.reasons import Refused
from pipeline.corpus.tar import Group, read_member
from pipeline.sections import Embed, Reading

# Where the captions of known corpora are. img2dataset writes `.txt` and the JSON field `caption`. Other tools keep the name of
# the column in the corpus's own metadata. The first of these places that a pair has counts.
PRESETS = {
    "laion": ("txt", "caption", "TEXT"),
    "datacomp": ("txt", "caption", "text"),
    "coyo": ("txt", "caption", "text"),
    "cc12m": ("txt", "caption"),
}
MAX_CAPTION = 4000  # characters; models read dozens of tokens, and a tokenizer takes the square of a word's length
SHOWN = 5  # members that a detail names
LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")


def find_pairs(file: BinaryIO, groups: Iterable[Group], reading: Reading, limits: Embed) -> Iterator[Group]:
    """The pairs of a shard: its groups, or where every caption is asked for, one for each caption of a group.

    The second caption of `a` is the pair `a.1`. A key that ends at the first dot has no dot, so no other pair has that key. A
    key that ends at the last dot may have one: of two pairs with one key the later one is a repetition.
    """
    if reading.pick != "all":
        yield from groups
        return
    index, keys = 0, set[str]()
    for group in groups:
        for number in range(_count(file, group, reading, limits)):
            pair = group.with_caption(index, number)
            pair.repeated |= pair.pair_key in keys
            keys.add(pair.pair_key)
            yield pair
            index += 1


def _count(file: BinaryIO, group: Group, reading: Reading, limits: Embed) -> int:
    """How many captions a group has. A group without any is one pair, which is refused when it is read."""
    try:
        return max(1, len(read_captions(file, group, read_fields(file, group, limits), reading, limits)))
    except Refused:
        return 1


def caption_of(file: BinaryIO, group: Group, reading: Reading, limits: Embed) -> str:
    """The caption of a pair. Raises Refused if it has none."""
    return read_caption(file, group, read_fields(file, group, limits), reading, limits)


def read_caption(file: BinaryIO, group: Group, fields: dict[str, Any], reading: Reading, limits: Embed) -> str:
    """The caption of a pair, see `find_pairs`. Raises Refused if that is no text."""
    captions = read_captions(file, group, fields, reading, limits)
    if group.caption >= len(captions) or not captions[group.caption].strip():
        raise Refused("empty_caption")
    text = captions[group.caption]
    if not is_unicode(text):
        raise Refused("bad_encoding", "a lone surrogate in the caption")
    return text if len(text) <= MAX_CAPTION else text.strip()[:MAX_CAPTION]


def read_captions(file: BinaryIO, group: Group, fields: dict[str, Any], reading: Reading, limits: Embed) -> list[str]:
    """All captions of a group, from the first of their places that it has. Without `pick` that is one text, as it is.

    Raises:
        Refused: there is none of these places, or what is there is no text.
    """
    places = PRESETS.get(reading.caption, (reading.caption,))
    place = next((p for p in places if (_suffix(p) in group.members if is_member(p) else fields.get(p) is not None)), None)
    if place is None:
        looked = [
            f"no .{_suffix(p)}" if is_member(p) else f"{'null in' if p in fields else 'no'} JSON field {p!r}" for p in places
        ]
        raise Refused("missing_caption", f"{' and '.join(looked)}; there {_what_is_there(group, fields)}")
    if is_member(place):
        text = decode_text(read_within(file, group, _suffix(place), limits))
        return lines_of(text) if reading.pick else [text]
    value = fields[place]
    if isinstance(value, str):
        return lines_of(value) if reading.pick else [value]
    if not isinstance(value, list):
        raise Refused("missing_caption", f"JSON field {place!r} is {kind_of(value)}, not text")
    if not reading.pick:
        raise Refused("missing_caption", f"JSON field {place!r} is a list: say which is meant by caption.pick: first or all")
    return [item.strip() for item in value if isinstance(item, str) and item.strip()]


def is_member(place: str) -> bool:
    """Whether a place of captions is a member of the tar. All others are fields of the JSON."""
    return place == "txt" or place.endswith(".txt") or place.startswith(".")


def _suffix(place: str) -> str:
    return place.removeprefix(".").lower()


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _what_is_there(group: Group, fields: dict[str, Any]) -> str:
    members = [f".{suffix}" for suffix in sorted(group.members)]
    members = members[:SHOWN] + (["..."] if len(members) > SHOWN else [])
    return f"are {', '.join(members)}" + (f" with the JSON fields {', '.join(map(repr, fields))}" if fields else "")


def decode_text(data: bytes) -> str:
    """The text in a member, without the mark that some editors begin UTF-8 with. Raises Refused if it is not UTF-8."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Refused("bad_encoding", "UTF-16 or UTF-32, not UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("bad_encoding", str(error)) from None
    if "\0" in text:  # which is what the Latin letters of UTF-16 look like
        raise Refused("bad_encoding", "zero bytes: UTF-16 or UTF-32, or no text")
    return text


def read_fields(file: BinaryIO, group: Group, limits: Embed) -> dict[str, Any]:
    """The fields of <key>.json, empty without that member. Raises Refused if it holds no JSON object."""
    if "json" not in group.members:
        return {}
    try:
        fields = json.loads(read_within(file, group, "json", limits))
    except RecursionError:  # its text depends on where it happened
        raise Refused("bad_json", "nested too deeply") from None
    except ValueError as error:
        raise Refused("bad_json", str(error)) from None
    if not isinstance(fields, dict):
        raise Refused("bad_json", f"{kind_of(fields)}, not an object")
    return fields


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def read_label(file: BinaryIO, group: Group, classes: int, limits: Embed) -> int:
    """The class in <key>.cls. Raises Refused if it is none of the classes."""
    if "cls" not in group.members:
        raise Refused("bad_label", "no .cls member")
    data = read_within(file, group, "cls", limits).removeprefix(codecs.BOM_UTF8)
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
