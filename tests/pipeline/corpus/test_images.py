"""Pixels are those of open_clip and Pillow to the bit, whoever decodes them; `fast` is near them."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ecif.towers import resize_transform
from pipeline.corpus import images
from pipeline.corpus.images import Resize, decode_jpeg, open_image, read_pixels
from pipeline.corpus.reasons import Refused
from pipeline.sections import Embed

LIMITS = Embed()
BASE = {"mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3}
SIDE = st.integers(1, 90)
PREPROCESS = st.fixed_dictionaries(
    {
        "size": st.one_of(st.sampled_from([(7, 7), (16, 16), (32, 32)]), st.tuples(st.integers(2, 40), st.integers(2, 40))),
        "interpolation": st.sampled_from(["bicubic", "bilinear"]),
        "resize_mode": st.sampled_from(["shortest", "longest", "squash"]),
        "fill_color": st.sampled_from([0, 128]),
    }
)
SQUARE = BASE | {"size": (32, 32), "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Smooth shapes with some noise, as photos have."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.integers(-20, 20, size=(height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_pillow_alone(data: bytes) -> np.ndarray:
    return np.asarray(resize_transform(SQUARE)(Image.open(io.BytesIO(data)).convert("RGB")))


@given(height=SIDE, width=SIDE, preprocess=PREPROCESS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_an_image_is_prepared_as_open_clip_prepares_it(height, width, preprocess):
    image = picture(height, width)
    try:
        truth = np.asarray(resize_transform(BASE | preprocess)(image))
    except ValueError:  # a thin line whose other side rounds to nothing
        with pytest.raises(ValueError):
            Resize(BASE | preprocess)(image)
        return
    assert np.array_equal(Resize(BASE | preprocess)(image), truth)
    decoded = np.dstack([np.asarray(image), np.full((height, width), 77, np.uint8)])
    assert np.array_equal(Resize(BASE | preprocess)(decoded), truth)
    fast = Resize(BASE | preprocess, "fast")
    for given_as in (image, decoded):
        found = fast(given_as)
        assert (found.shape, found.dtype) == (truth.shape, np.uint8)
        assert np.abs(found.astype(int) - truth).max() <= 3


@given(
    height=st.integers(1, 100),
    width=st.integers(1, 100),
    mode=st.sampled_from(["RGB", "L"]),
    quality=st.integers(5, 100),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    progressive=st.booleans(),
    restart=st.sampled_from([0, 1]),
    orientation=st.integers(1, 8),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_jpeg_is_decoded_as_pillow_decodes_it(height, width, mode, orientation, restart, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(picture(height, width, mode), exif=exif, icc_profile=b"of a camera", restart_marker_rows=restart, **options)
    decoded = decode_jpeg(data, open_image(data, LIMITS))
    assert decoded is not None, "a plain JPEG needs no Pillow"
    assert np.array_equal(decoded[..., :3], np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["CMYK", "MPO", "PNG", "P", "RGBA", "WEBP"])
def test_what_is_no_plain_jpeg_is_left_to_pillow(kind):
    buffer = io.BytesIO()
    if kind == "CMYK":
        picture(40, 50, "CMYK").save(buffer, "JPEG")
    elif kind == "MPO":
        picture(40, 50).save(buffer, "MPO", save_all=True, append_images=[picture(40, 50)])
    elif kind in ("P", "RGBA"):
        picture(40, 50, kind).save(buffer, "PNG")
    else:
        picture(40, 50).save(buffer, kind)
    data = buffer.getvalue()
    assert decode_jpeg(data, open_image(data, LIMITS)) is None
    assert np.array_equal(read_pixels(data, LIMITS, Resize(SQUARE)), with_pillow_alone(data))


WHOLE = [jpeg(picture(60, 80)), jpeg(picture(60, 80), progressive=True), jpeg(picture(60, 80, "L"))]


@given(
    which=st.sampled_from(range(len(WHOLE))),
    at=st.floats(0, 1),
    damage=st.binary(max_size=20),
    keep=st.floats(0, 1),
    more=st.binary(max_size=5),
)
@example(which=0, at=0.5, damage=b"", keep=0.5, more=b"")
@example(which=0, at=0.0, damage=WHOLE[0][:20], keep=1.0, more=b"behind its end")
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_damaged_jpeg_becomes_what_pillow_makes_of_it(which, at, damage, keep, more):
    whole = WHOLE[which]
    start = int(at * (len(whole) - 1))
    data = (whole[:start] + damage + whole[start + len(damage) :])[: max(1, int(keep * len(whole)))] + more

    def outcome() -> tuple[str, str] | bytes:
        try:
            return read_pixels(data, LIMITS, Resize(SQUARE)).tobytes()
        except Refused as refused:
            return refused.reason, refused.detail

    both = outcome()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(images, "decode_jpeg", lambda *_: None)
        assert outcome() == both


def resized_header(data: bytes, height: int, width: int) -> bytes:
    """The JPEG, with another size in its header."""
    at = next(i for i in range(len(data)) if data[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_refused_by_its_header_before_anything_is_decoded(monkeypatch, progressive):
    def undecoded(*_, **__):
        raise AssertionError("decoded before it was refused")

    data = jpeg(picture(60, 80), progressive=progressive)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", undecoded)
    monkeypatch.setattr(Image.Image, "convert", undecoded)
    for height, width in ((65_000, 65_000), (10_000, 10_000), (1, 300)):
        with pytest.raises(Refused) as refused:
            read_pixels(resized_header(data, height, width), LIMITS, Resize(SQUARE))
        assert refused.value.reason == "too_many_pixels"


def test_a_jpeg_that_is_larger_than_pillow_read_in_its_header_does_not_fit():
    small, large = jpeg(picture(8, 8)), jpeg(picture(600, 800))
    assert decode_jpeg(large, open_image(small, LIMITS)) is None
    assert decode_jpeg(small, open_image(large, LIMITS)) is None
