"""Say what some bytes are, by how they begin: what a crawler saved under the name of an image is often something else."""

import re

SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"8BPS", "PSD"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"%PDF", "PDF"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\3\4", "zip"),
    (b"\x1a\x45\xdf\xa3", "Matroska or WebM video"),
    (b"RIFF", "RIFF"),
    (b"version https://git-lfs", "a Git LFS pointer"),
)
BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}  # ISO 14496-12
MARKUP = (
    (re.compile(rb"<svg\b"), "SVG"),
    (re.compile(rb"<(!doctype html|html|head|body|title|script)\b"), "HTML"),
    (re.compile(rb"^(<\?xml|<)"), "XML"),
    (re.compile(rb"^[{\[]"), "JSON"),
)
START = 1024  # bytes that are looked at


def signature(data: bytes) -> str:
    """The name of a format, `empty`, `zeros`, `text`, or the first bytes of what is not known."""
    start = data[:START]
    if not data:
        return "empty"
    if start.startswith(b"RIFF") and (len(start) < 12 or start[8:12] == b"WEBP"):
        return "WebP"
    if start.startswith(b"BM") and start[6:10] == bytes(4):
        return "BMP"
    if start[4:8] == b"ftyp":
        return BRANDS.get(start[8:12], "MP4 video")
    if known := next((name for magic, name in SIGNATURES if start.startswith(magic)), None):
        return known
    if not any(start):
        return "zeros"
    plain = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if markup := next((name for pattern, name in MARKUP if pattern.search(plain)), None):
        return markup
    if is_text(start):
        return "text"
    return f"unknown bytes {start[:8].hex(' ')}"


def is_text(start: bytes) -> bool:
    """Whether bytes are readable UTF-8, whose last character may be cut."""
    text = start.decode("utf-8", "replace").rstrip("\ufffd")
    return "\ufffd" not in text and all(c.isprintable() or c.isspace() for c in text)
