"""What a file is, by its first bytes; the same words for the same bytes."""

import gzip
import io

import pytest
from PIL import Image

from pipeline.corpus.signatures import signature
from tests.support.tars import image, tar_bytes


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "ICO", "PDF", "AVIF"])
def test_images_as_pillow_writes_them(format):
    assert signature(encoded(format)) == format


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "empty"),
        (bytes(5000), "zeros"),
        (b"<!DOCTYPE html><title>403 Forbidden</title>", "HTML"),
        (b"\xef\xbb\xbf\n <HTML><body>", "HTML"),
        (b"<?xml version='1.0'?><!-- a comment --><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<svg>", "SVG"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b'{"error": "not found"}', "JSON"),
        (b"BMW, a car", "text"),
        ("nicht gefunden: Größe".encode(), "text"),
        ("ä".encode() * 2000, "text"),
        (b"\0\0\0\x1cftypheic" + bytes(20), "HEIC"),
        (b"\0\0\0\x1cftypisom" + bytes(20), "MP4 video"),
        (b"RIFF\x24\0\0\0AVI LIST", "RIFF"),
        (gzip.compress(b"x", mtime=0), "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"\x01\x02\x03\x04\x05\xff\xfe\xfd\xfc", "unknown bytes 01 02 03 04 05 ff fe fd"),
        (image("JPEG")[:5], "JPEG"),
        (image("WEBP")[:6], "WebP"),
    ],
)
def test_what_else_is_found_under_the_name_of_an_image(data, name):
    assert signature(data) == name


def test_a_tar_is_no_text():
    assert signature(tar_bytes([("a", b"b")])) not in ("text", "zeros", "empty")
