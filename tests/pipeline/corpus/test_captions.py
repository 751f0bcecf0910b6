"""Where captions are, how many of them are pairs, and what is said where there is none."""

import codecs
import io
import json

import pytest

from pipeline.corpus.captions import MAX_CAPTION, caption_of, find_pairs
from pipeline.corpus.reasons import Refused
from pipeline.corpus.tar import Contents, read_groups
from pipeline.sections import Embed, Reading
from tests.support.tars import tar_bytes

LIMITS = Embed()
FIVE = ["a red disc", "there is a disc", "we see a disc", "disc", "a disc on blue"]


def captions(members: list[tuple[str, bytes]], *reading: str) -> list[tuple[str, str]]:
    """Of each pair, its key and its caption, or the reason why it has none."""
    file, asked, found = io.BytesIO(tar_bytes([("0.jpg", b""), *members])), Reading(*reading), []
    for i, group in enumerate(find_pairs(file, read_groups(file, Contents(), asked.key), asked, LIMITS)):
        assert group.index == i
        try:
            found.append((group.pair_key, caption_of(file, group, asked, LIMITS)))
        except Refused as refused:
            found.append((group.pair_key, refused.reason))
    return found


def refusal(members: list[tuple[str, bytes]], *reading: str) -> tuple[str, str]:
    """Reason and detail of the only pair."""
    file, asked = io.BytesIO(tar_bytes([("0.jpg", b""), *members])), Reading(*reading)
    (group,) = read_groups(file, Contents())
    with pytest.raises(Refused) as caught:
        caption_of(file, group, asked, LIMITS)
    return caught.value.reason, caught.value.detail


def fields(**values) -> tuple[str, bytes]:
    return "0.json", json.dumps(values).encode()


@pytest.mark.parametrize(
    ("place", "name"), [("caption.txt", "0.caption.txt"), ("0.txt", "0.0.TXT"), (".text", "0.text"), (".Caption", "0.caption")]
)
def test_a_caption_may_be_in_any_member(place, name):
    assert captions([(name, b"here")], place) == [("0", "here")]
    assert captions([("0.txt", b"elsewhere")], place) == [("0", "missing_caption")]


@pytest.mark.parametrize("place", ["txt", "caption.txt"])
def test_a_byte_order_mark_is_no_part_of_a_caption(place):
    text = codecs.BOM_UTF8 + "née".encode()
    assert captions([(f"0.{place}", text)], place) == [("0", "née")]
    assert captions([(f"0.{place}", codecs.BOM_UTF8)], place) == [("0", "empty_caption")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_may_be_in_any_unicode(encoding):
    assert captions([("0.json", '{"caption": "née"}'.encode(encoding))], "caption") == [("0", "née")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "latin-1"])
def test_another_encoding_is_refused_and_never_garbage(encoding):
    reason, detail = refusal([("0.txt", "née, a caption".encode(encoding))])
    assert reason == "bad_encoding"
    assert ("UTF-16" in detail) == encoding.startswith("utf") or "can't decode" in detail


THERE = "there are .caption.txt, .jpg, .json with the JSON fields 'uid'"
NULL = "there are .jpg, .json with the JSON fields 'caption'"
PICK = "say which is meant by caption.pick: first or all"


@pytest.mark.parametrize(
    ("members", "place", "detail"),
    [
        ([("0.caption.txt", b"a"), fields(uid="x")], "txt", f"no .txt; {THERE}"),
        ([("0.txt", b"a")], "caption", "no JSON field 'caption'; there are .jpg, .txt"),
        ([fields(captions=FIVE)], "captions", f"JSON field 'captions' is a list: {PICK}"),
        ([fields(caption=None)], "caption", f"null in JSON field 'caption'; {NULL}"),
        ([fields(caption=7)], "caption", "JSON field 'caption' is a number, not text"),
        ([fields(caption=True)], "caption", "JSON field 'caption' is true, not text"),
        ([fields(caption={"en": "a"})], "caption", "JSON field 'caption' is an object, not text"),
    ],
)  # fmt: skip
def test_a_missing_caption_says_what_there_is(members, place, detail):
    assert refusal(members, place) == ("missing_caption", detail)


LINES = ("0.txt", ("\ufeff" + "\r\n\n".join(FIVE) + "\n \n").encode())
LISTED = fields(captions=[None, *FIVE, " ", 7], caption="\n".join(FIVE))


@pytest.mark.parametrize("place", ["txt", "laion", "captions", "caption"])
def test_several_captions(place):
    members = [
        LINES,
        LISTED,
        ("1.jpg", b""),
        ("1.txt", b"only one"),
        ("1.json", b'{"caption": "only one", "captions": ["only one"]}'),
    ]
    assert captions(members, place, "first") == [("0", FIVE[0]), ("1", "only one")]
    assert captions(members, place, "all") == [
        ("0", FIVE[0]), *((f"0.{i}", text) for i, text in enumerate(FIVE) if i), ("1", "only one")
    ]  # fmt: skip


def test_by_default_a_text_is_one_caption():
    assert captions([LINES]) == [("0", LINES[1].decode().removeprefix("\ufeff"))]


@pytest.mark.parametrize("pick", ["first", "all"])
@pytest.mark.parametrize(
    ("members", "place", "reason"),
    [
        ([("0.txt", b" \n\n")], "txt", "empty_caption"),
        ([fields(captions=[])], "captions", "empty_caption"),
        ([fields(captions=[None, 3, ["a"]])], "captions", "empty_caption"),
        ([], "txt", "missing_caption"),
        ([("0.json", b"[]")], "captions", "bad_json"),
        ([("0.txt", b"\xff")], "txt", "bad_encoding"),
    ],
)
def test_a_group_without_a_caption_is_one_pair_that_is_refused(members, place, reason, pick):
    assert captions(members, place, pick) == [("0", reason)]


def test_each_caption_is_judged_by_itself():
    listed = fields(captions=["good", "\ud83d", "w" * (MAX_CAPTION + 1)])
    assert captions([listed], "captions", "all") == [("0", "good"), ("0.1", "bad_encoding"), ("0.2", "w" * MAX_CAPTION)]


def test_keys_of_captions_are_unique_even_where_keys_have_dots():
    members = [("0.txt", b"a\nb"), ("0.1.jpg", b""), ("0.1.txt", b"c\nd")]
    file = io.BytesIO(tar_bytes([("0.jpg", b""), *members]))
    reading = Reading("txt", "all", "last_dot")
    groups = list(find_pairs(file, read_groups(file, Contents(), "last_dot"), reading, LIMITS))
    assert [(g.pair_key, g.repeated, g.count) for g in groups] == [
        ("0", False, 2), ("0.1", False, 0), ("0.1", True, 2), ("0.1.1", False, 0)
    ]  # fmt: skip
