"""A pair is decoded, or refused for one reason of a closed list."""

import hashlib
import io
import json
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from webdataset.autodecode import imagehandler as decoder

from pipeline.corpus.captions import MAX_CAPTION, PRESETS
from pipeline.corpus.images import Resize
from pipeline.corpus.pairs import Pair, Quarantined, ReadingRules, read_pair
from pipeline.corpus.reasons import REASONS, Reason
from pipeline.corpus.tar import Contents, read_groups
from pipeline.corpus.uids import uid_of
from pipeline.sections import Embed, Reading
from tests.support.tars import bomb, image, pair, tar_bytes

RESIZE = Resize(
    {
        "size": (32, 32),
        "mode": "RGB",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
)
LIMITS = Embed()
UID = "0123456789abcdef" * 2
BAD_NAME = b"\xff\xfe".decode("utf-8", "surrogateescape")
PIXELS, TEXT = ("0.png", image()), ("0.txt", b"a caption")
TOO_LONG = LIMITS.max_member_bytes + 1


def undecoded(picture):
    raise AssertionError("decoded before it was refused")


CLASSES = [f"a photo of a {name}." for name in ("cat", "dog", "axolotl")]


def read(members, caption="txt", limits=LIMITS, resize=RESIZE, cut=None, shard="00000", classes=()):
    data = tar_bytes(members)
    return [
        read_pair(
            io.BytesIO(data[:cut]),
            group,
            ReadingRules(shard, Reading(caption), limits, resize, classes),
        )
        for group in read_groups(io.BytesIO(data), Contents())
    ]


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(64) + data[middle + 64 :]


def fields(**values) -> tuple[str, bytes]:
    return "0.json", json.dumps(values).encode()


REFUSED = [
    pytest.param([TEXT], "txt", "missing_image", id="no image"),
    pytest.param([("0.gif", image("GIF")), TEXT], "txt", "missing_image", id="an image of another format"),
    pytest.param([PIXELS], "txt", "missing_caption", id="no txt"),
    pytest.param([PIXELS, TEXT], "caption", "missing_caption", id="no json"),
    pytest.param([PIXELS, fields(text="a")], "caption", "missing_caption", id="another field"),
    pytest.param([PIXELS, fields(caption=None)], "caption", "missing_caption", id="null"),
    pytest.param([PIXELS, fields(caption=7)], "caption", "missing_caption", id="a number"),
    pytest.param([PIXELS, ("0.txt", b"")], "txt", "empty_caption", id="no bytes"),
    pytest.param([PIXELS, ("0.txt", " \n\t\u3000".encode())], "txt", "empty_caption", id="white space"),
    pytest.param([PIXELS, fields(caption="")], "caption", "empty_caption", id="an empty field"),
    pytest.param([PIXELS, ("0.txt", b"caf\xe9")], "txt", "bad_encoding", id="Latin-1"),
    pytest.param([PIXELS, ("0.json", b'{"caption": "\\ud83d"}')], "caption", "bad_encoding", id="a lone surrogate"),
    pytest.param([(f"{BAD_NAME}.png", image()), (f"{BAD_NAME}.txt", b"a")], "txt", "bad_encoding", id="the member's name"),
    pytest.param([PIXELS, TEXT, ("0.json", b"")], "txt", "bad_json", id="nothing"),
    pytest.param([PIXELS, TEXT, ("0.json", b'{"caption": ')], "txt", "bad_json", id="half an object"),
    pytest.param([PIXELS, TEXT, ("0.json", b'{"a": "\xff"}')], "txt", "bad_json", id="no UTF-8"),
    pytest.param([PIXELS, TEXT, ("0.json", b'["caption"]')], "txt", "bad_json", id="a list"),
    pytest.param([PIXELS, TEXT, ("0.json", b"null")], "txt", "bad_json", id="JSON null"),
    pytest.param([PIXELS, TEXT, ("0.json", b"[" * 100_000)], "txt", "bad_json", id="depth 100000"),
    pytest.param([PIXELS, TEXT, ("0.json", b'{"a":' * 100_000)], "txt", "bad_json", id="objects, depth 100000"),
    pytest.param([PIXELS, TEXT, ("0.json", b'{"a": %s}' % (b"9" * 10_000))], "txt", "bad_json", id="a number of 10000 digits"),
    pytest.param([("0.png", bytes(TOO_LONG)), TEXT], "txt", "too_large_member", id="the image"),
    pytest.param([PIXELS, ("0.txt", bytes(TOO_LONG))], "txt", "too_large_member", id="the caption"),
    pytest.param([PIXELS, TEXT, ("0.json", bytes(TOO_LONG))], "txt", "too_large_member", id="the JSON"),
    pytest.param([("0.png", bomb(12_000, 12_000, True)), TEXT], "txt", "too_many_pixels", id="a bomb"),
    pytest.param([("0.png", bomb(2**31 - 1, 2**31 - 1, False)), TEXT], "txt", "too_many_pixels", id="a header like a bomb"),
    pytest.param([("0.png", image(size=(1, 1000))), TEXT], "txt", "too_many_pixels", id="a line that resizing multiplies"),
    pytest.param([("0.jpg", b""), TEXT], "txt", "undecodable_image", id="no bytes of an image"),
    pytest.param([("0.jpg", b"<html>404</html>"), TEXT], "txt", "undecodable_image", id="a web page"),
    pytest.param([("0.jpg", image("GIF")), TEXT], "txt", "undecodable_image", id="another format behind the suffix"),
    pytest.param([("0.jpg", image("JPEG", (64, 64))[:-800]), TEXT], "txt", "truncated_image", id="half a JPEG"),
    pytest.param([("0.png", image(size=(64, 64))[:-800]), TEXT], "txt", "truncated_image", id="half a PNG"),
    pytest.param([("0.webp", image("WEBP", (64, 64))[:-800]), TEXT], "txt", "truncated_image", id="half a WEBP"),
    pytest.param([("0.jpg", image("JPEG", (64, 64))[:10]), TEXT], "txt", "truncated_image", id="the start of a header"),
    pytest.param([("0.png", damaged(image(size=(64, 64)))), TEXT], "txt", "undecodable_image", id="damage in mid-image"),
    pytest.param([PIXELS, TEXT, TEXT], "txt", "duplicate_key", id="a suffix twice"),
]


@pytest.mark.parametrize(("members", "caption", "reason"), REFUSED)
def test_a_pair_is_refused_for_its_reason(members, caption, reason):
    (outcome,) = read(members, caption)
    assert isinstance(outcome, Quarantined)
    assert outcome.reason == reason
    assert len(outcome.detail.encode()) <= 2000  # and both can be written to a table: nothing that UTF-8 can't say
    assert outcome.key.encode()
    assert " at 0x" not in outcome.detail  # the address of an object: another one in each run


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "empty, not JPEG, PNG or WebP"),
        (b"<html>404</html>", "HTML, not JPEG, PNG or WebP"),
        (image("GIF"), "GIF, not JPEG, PNG or WebP"),
        (b"\x89PNG\r\n\x1a\n" + b"IEND" * 9, "PNG: UnidentifiedImageError: cannot identify image file"),
    ],
)
def test_what_is_no_image_is_said_in_the_same_words_each_time(data, detail):
    (outcome,) = read([("0.jpg", data), TEXT])
    assert (outcome.reason, outcome.detail) == ("undecodable_image", detail)


def test_every_reason_has_its_example():
    elsewhere = {"bad_label", "truncated_shard", "non_finite_features", "alone_in_shard"}  # below, and in other modules
    assert {case.values[2] for case in REFUSED} | elsewhere == set(REASONS) == set(get_args(Reason))


@pytest.mark.parametrize("data", [bomb(12_000, 12_000, True), bomb(60_000, 60_000, False), image(size=(1, 1000))])
def test_too_many_pixels_are_refused_before_any_is_decoded(data):
    (outcome,) = read([("0.png", data), TEXT], resize=undecoded)
    assert outcome.reason == "too_many_pixels"


@pytest.mark.parametrize("size", [(1, 200), (200, 1), (100, 100)])
def test_the_limits_themselves_are_allowed(size):
    data = image(size=size)
    limits = Embed(max_pixels=size[0] * size[1], max_member_bytes=len(data))
    assert isinstance(read([("0.png", data), TEXT], limits=limits)[0], Pair)
    assert read([("0.png", data), TEXT], limits=Embed(max_pixels=size[0] * size[1] - 1))[0].reason == "too_many_pixels"
    assert read([("0.png", data), TEXT], limits=Embed(max_member_bytes=len(data) - 1))[0].reason == "too_large_member"


@pytest.mark.parametrize("cut", [512 + 10, 512 + 20])
def test_a_member_that_is_not_all_there_is_never_used(cut):
    assert [outcome.reason for outcome in read([PIXELS, TEXT], cut=cut)] == ["truncated_shard"]


def test_a_repeated_key_is_refused_and_its_first_pair_kept():
    first, other, again = read([*pair("0", "first"), *pair("1"), *pair("0", "second")])
    assert (first.caption, other.key) == ("first", "1")
    assert (again.index, again.key, again.reason) == (2, "0", "duplicate_key")


PALETTE = Image.new("P", (9, 7), 1)
PALETTE.putpalette([255, 0, 0, 0, 255, 0])
FRAMES = [Image.new("RGB", (16, 12), colour) for colour in ("red", "blue")]
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 6, "turned"


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        pytest.param("jpg", image("JPEG"), id="JPEG"),
        pytest.param("JPEG", image("JPEG", mode="L"), id="grey JPEG"),
        pytest.param("jpg", image("JPEG", mode="CMYK"), id="CMYK JPEG"),
        pytest.param("jpg", encoded(FRAMES[0], "JPEG", exif=EXIF), id="JPEG with EXIF"),
        pytest.param("jpg", image("JPEG", (64, 64), progressive=True), id="progressive JPEG"),
        pytest.param("png", image(mode="RGBA"), id="RGBA"),
        pytest.param("png", image(mode="LA"), id="grey with alpha"),
        pytest.param("png", encoded(PALETTE, "PNG"), id="palette"),
        pytest.param("png", encoded(PALETTE, "PNG", transparency=1), id="palette with transparency"),
        pytest.param("png", encoded(Image.new("I;16", (9, 7), 40_000), "PNG"), id="16 bits"),
        pytest.param("png", encoded(Image.new("1", (9, 7), 1), "PNG"), id="1 bit"),
        pytest.param("png", image(size=(1, 1)), id="1 x 1"),
        pytest.param("webp", image("WEBP"), id="WEBP"),
        pytest.param("WebP", encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), id="animated WEBP"),
        pytest.param("jpg", image("WEBP"), id="WEBP that is called .jpg"),
    ],
)
def test_real_images_of_every_kind_become_rgb_of_the_models_size(suffix, data):
    (outcome,) = read([(f"0.{suffix}", data), TEXT])
    assert (outcome.pixels.shape, outcome.pixels.dtype) == ((32, 32, 3), np.uint8)
    assert outcome.pixels.flags.c_contiguous


def test_pixels_are_the_models_own_preprocessing():
    (outcome,) = read([("0.png", image(size=(48, 40))), TEXT])
    assert np.array_equal(outcome.pixels, RESIZE(Image.open(io.BytesIO(image(size=(48, 40))))))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_is_cut_anywhere_is_truncated_or_whole(format):
    data = image(format, (64, 64))
    whole = read([("0.jpg", data), TEXT])[0].pixels
    for cut in [3, 4, 5, *range(6, len(data), len(data) // 40), *range(len(data) - 30, len(data))]:
        (outcome,) = read([("0.jpg", data[:cut]), TEXT])
        if isinstance(outcome, Pair):  # the last bytes of a PNG say nothing of its pixels
            assert np.array_equal(outcome.pixels, whole)
        else:
            assert outcome.reason == ("truncated_image" if cut > 4 else outcome.reason)


def pixels_of(data: bytes) -> np.ndarray:
    return read([("0.png", data), TEXT])[0].pixels


def test_an_image_is_what_the_training_loader_makes_of_it():
    """webdataset's `pilrgb`, which open_clip trains with: the first frame, as RGB, not turned."""
    turned, plain = encoded(FRAMES[0], "JPEG", exif=EXIF), encoded(FRAMES[0], "JPEG")
    animated = encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True)
    assert np.array_equal(pixels_of(turned), pixels_of(plain))
    assert np.array_equal(pixels_of(animated), pixels_of(encoded(FRAMES[0], "WEBP", lossless=True)))
    others = [image(mode="RGBA", size=(48, 40)), encoded(Image.new("I;16", (48, 40), 400), "PNG"), image("JPEG", mode="CMYK")]
    for data in [*others, encoded(PALETTE, "PNG")]:
        rgb = decoder("pilrgb")("0.png", data)
        assert np.array_equal(pixels_of(data), RESIZE(rgb))


def test_the_caption_is_what_the_configured_place_says():
    members = [PIXELS, ("0.txt", "  née\n".encode()), fields(caption="from JSON", TEXT="in capitals")]
    assert [read(members, place)[0].caption for place in ("txt", "caption", "TEXT")] == ["  née\n", "from JSON", "in capitals"]


@pytest.mark.parametrize(("label", "written"), [(0, b"0"), (2, b"2\n"), (1, b" 01 "), (1, b"\xef\xbb\xbf1\r\n")])
def test_a_classification_pair_is_captioned_by_its_class(label, written):
    """The layout of clip_benchmark's WebDatasets: an image and a class index."""
    (outcome,) = read([PIXELS, ("0.cls", written)], classes=CLASSES)
    assert (outcome.label, outcome.caption) == (label, CLASSES[label])
    assert read([PIXELS, TEXT, ("0.cls", written)])[0].label is None  # which a corpus of captions does not look at


@pytest.mark.parametrize(
    "written", [b"3", b"-1", b"", b"1.0", b"cat", b"1 2", b"1_0", "\u0661".encode(), b"\xff", b"9" * 5000, None]
)
def test_a_label_that_is_no_class_is_refused(written):
    (outcome,) = read([PIXELS, TEXT, *([] if written is None else [("0.cls", written)])], classes=CLASSES)
    assert (outcome.reason, len(outcome.detail) < 300) == ("bad_label", True)
    too_large = read([PIXELS, ("0.cls", bytes(TOO_LONG))], classes=CLASSES)
    assert too_large[0].reason == "too_large_member"


def test_the_uid_is_that_of_the_json():
    (found,) = read([PIXELS, TEXT, fields(uid=UID)])
    assert (found.uid, found.replaced) == (UID, None)
    assert read([TEXT, fields(uid=UID)])[0].uid == UID  # a refused pair can be found again too


def test_a_uid_that_is_none_is_replaced_and_that_is_kept():
    made_up = uid_of("00000", "0", None).text
    assert [(p.uid, p.replaced) for p in read([PIXELS, TEXT, fields(uid=7)])] == [(made_up, "7")]
    assert [(p.uid, p.replaced) for p in read([PIXELS, TEXT])] == [(made_up, "")]


def test_equal_keys_of_different_shards_are_different_pairs():
    uids = [read(pair(key), shard=shard)[0].uid for shard in ("00000", "00001", "a/00000") for key in ("0", "1")]
    assert len(set(uids)) == 6
    assert all(len(uid) == 32 and int(uid, 16) >= 0 for uid in uids)


def test_names_that_are_no_utf8_still_tell_pairs_apart():
    names = [bytes([byte]).decode("utf-8", "surrogateescape") for byte in (0xFE, 0xFF)]
    outcomes = [outcome for name in names for outcome in read([(f"{name}.txt", b"a")])]
    assert len({outcome.uid for outcome in outcomes}) == len({outcome.key for outcome in outcomes}) == 2


@pytest.mark.parametrize(("preset", "own"), [("laion", "TEXT"), ("datacomp", "text"), ("coyo", "text"), ("cc12m", "caption")])
def test_a_preset_finds_the_caption_where_img2dataset_or_the_corpus_itself_has_it(preset, own):
    txt, renamed, original = ("0.txt", b"in txt"), {"caption": "renamed"}, {own: "the corpus's own"}
    assert read([PIXELS, txt, fields(**original)], preset)[0].caption == "in txt"
    assert read([PIXELS, fields(**(original | renamed))], preset)[0].caption == "renamed"
    assert read([PIXELS, fields(**original)], preset)[0].caption == "the corpus's own"
    missing = read([PIXELS, fields(title="elsewhere")], preset)[0]
    assert missing.reason == "missing_caption"
    assert all(f"'{place}'" in missing.detail for place in PRESETS[preset][1:])


def test_an_empty_caption_is_not_replaced_by_another():
    assert read([PIXELS, ("0.txt", b" "), fields(caption="a")], "laion")[0].reason == "empty_caption"


def test_a_long_caption_is_cut_to_what_a_model_can_read():
    """10 MB in one word: a tokenizer would take the square of it."""
    (outcome,) = read([PIXELS, ("0.txt", b"  a" * 5_000_000)])
    assert outcome.caption == ("  a" * 5_000_000).strip()[:MAX_CAPTION]
    assert read([PIXELS, ("0.txt", b"w" * 10_000_000)])[0].caption == "w" * MAX_CAPTION


def test_uids_of_a_sidecar_replace_those_of_the_json():
    data = tar_bytes([PIXELS, TEXT, fields(uid=UID), *pair("1", uid=UID)])
    uids = {"0": "f" * 32, "1": "no uid"}
    first, second = (
        read_pair(io.BytesIO(data), group, ReadingRules("00000", Reading(), LIMITS, RESIZE, uids=uids))
        for group in read_groups(io.BytesIO(data), Contents())
    )
    assert (first.uid, second.uid) == ("f" * 32, uid_of("00000", "1", None).text)
    assert (first.replaced, second.replaced) == (None, "no uid")


def test_the_hash_of_an_image_is_that_of_its_bytes_and_of_nothing_else():
    one, other = image(), image(seed=1)
    read_pairs = read([("0.png", one), TEXT, ("1.png", one), ("1.txt", b"another caption"), ("2.png", other), ("2.txt", b"a")])
    hashes = [pair.image_hash for pair in read_pairs]
    assert hashes[0] == hashes[1] == hashlib.blake2b(one, digest_size=16).hexdigest() != hashes[2]
