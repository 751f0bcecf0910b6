"""Tars and images, made on the fly."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def tar_bytes(members: list[tuple[str, bytes] | tarfile.TarInfo], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of files, given by name and content, and of anything else, given by its header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))
    return path


def read_tar(path: Path) -> list[tuple[str, bytes]]:
    """Name and content of every member, in order."""
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def header(name: str, kind: bytes) -> tarfile.TarInfo:
    """A member that is no file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "elsewhere" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return info


def image(format: str = "PNG", size: tuple[int, int] = (8, 6), mode: str = "RGB", seed: int = 0, **options) -> bytes:
    """An encoded image of noise."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.frombytes(mode, size, noise.tobytes()).save(buffer, format, **options)
    return buffer.getvalue()


def bomb(width: int, height: int, decodable: bool) -> bytes:
    """A one-bit PNG whose header announces any size; a decodable one really has that many pixels, compressed to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes((width // 8 + 1) * height) if decodable else b"")
    ihdr = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pair(key: str, caption: str = "a caption", **fields) -> list[tuple[str, bytes]]:
    """The three members of a good pair; its image depends on the key."""
    pixels = image(seed=zlib.crc32(key.encode()))
    return [(f"{key}.png", pixels), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps(fields).encode())]
