"""Shards made to do harm, by someone or by the web: read in bounded time and memory, every pair accounted for."""

import io
import json
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.reading import read_shard
from tests.support.tars import bomb, header, image, pair, tar_bytes, write_tar

MIB = 1 << 20


@pytest.fixture
def shard(tmp_path):
    """Write a shard, read it."""

    def read(members, **options):
        (tmp_path / "0.tar").write_bytes(members if isinstance(members, bytes) else tar_bytes(members))
        return read_shard(str(tmp_path / "0.tar"), **options)

    return read


@pytest.fixture
def bounded():
    """The test may not take long, nor this process ever hold 250 MiB more than before it (the test's own tar included)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = memory("VmRSS"), time.process_time()
    yield
    assert time.process_time() - started < 30
    assert memory("VmHWM") - before < 250


def memory(name: str) -> float:
    """A figure of this process in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def test_decompression_bombs(shard, bounded):
    bombs = [bomb(60_000, 60_000, False), bomb(12_000, 12_000, True), bomb(2**31 - 1, 2**31 - 1, False), bomb(1, 10**6, True)]
    members = [m for i, data in enumerate(bombs) for m in ((f"{i}.png", data), (f"{i}.txt", b"a bomb"))]
    found = shard([*members, *pair("good")])
    assert found.reasons() == dict.fromkeys("0123", "too_many_pixels")
    assert [p[1] for p in found.pairs] == ["good"]


def test_a_hundred_thousand_members_of_nothing(shard, bounded):
    members = b"".join(tarfile.TarInfo(f"{i:06d}.jpg").tobuf(tarfile.USTAR_FORMAT) for i in range(100_000))
    found = shard(members + bytes(1024))
    assert (found.accounting.members, found.accounting.pairs, found.pairs) == (100_000, 100_000, [])
    assert set(found.reasons().values()) == {"missing_caption"}


def test_twenty_thousand_members_of_one_key(shard, bounded):
    members = b"".join(tarfile.TarInfo(f"0.{i:06d}").tobuf(tarfile.USTAR_FORMAT) for i in range(20_000))
    found = shard(members + bytes(1024))
    assert (found.accounting.in_pairs, found.accounting.pairs) == (20_000, 1)
    assert found.reasons() == {"0": "missing_caption"}


OUTSIDE = ["../../../../etc/passwd", "/etc/passwd", "/../0", "C:\\0", "a/../../0", "./0", "a\\0", "~/0"]


@pytest.mark.parametrize("key", OUTSIDE)
def test_names_that_lead_elsewhere_are_only_names(shard, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = shard(pair(key))
    assert [p[1] for p in found.pairs] == [key]
    assert [f.name for f in tmp_path.rglob("*")] == ["0.tar"]


def test_links_and_devices_are_counted_and_never_followed(shard, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(image())
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    others = [header(f"0.{suffix}", kind) for kind in kinds for suffix in ("jpg", "txt")]
    for member in others:
        member.linkname = str(tmp_path / "secret.jpg")
        member.devmajor, member.devminor = 1, 5  # /dev/zero
    found = shard([*others, ("0.txt", b"only this is a file"), *pair("1")])
    assert (found.accounting.ignored, found.accounting.in_pairs) == (12, 4)
    assert found.reasons() == {"0": "missing_image"}


def test_a_sparse_file_is_no_part_of_a_pair(shard):
    """Its header announces a terabyte that the tar does not hold."""
    sparse = bytearray(tarfile.TarInfo("0.jpg").tobuf(tarfile.GNU_FORMAT))
    sparse[156:157] = tarfile.GNUTYPE_SPARSE
    sparse[483:495] = b"\x80" + (10**12).to_bytes(11, "big")
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    found = shard(bytes(sparse) + tar_bytes([("0.txt", b"a"), *pair("1")]))
    assert found.accounting.ignored == 1
    assert found.reasons() == {"0": "missing_image"}


def test_keys_that_are_there_twice(shard, tmp_path):
    found = shard([*pair("0", "first"), *pair("1"), *pair("0", "second"), *pair("1")])
    assert [p[1::2] for p in found.pairs] == [["0", "first"], ["1", "a caption"]]
    assert [(q["key"], q["reason"]) for q in found.quarantined] == [("0", "duplicate_key"), ("1", "duplicate_key")]


def test_the_same_key_in_two_shards_is_two_pairs(tmp_path):
    urls = [str(write_tar(tmp_path / f"{i}.tar", pair("0"))) for i in range(2)]
    uids = {read_shard(url, shard=str(i)).pairs[0][2] for i, url in enumerate(urls)}
    assert len(uids) == 2


def test_captions_that_are_no_utf8(shard):
    bad = [b"caf\xe9", b"\xff\xfe\x00a", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80"]
    found = shard([m for i, text in enumerate(bad) for m in ((f"{i}.png", image()), (f"{i}.txt", text))])
    assert set(found.reasons().values()) == {"bad_encoding"}
    assert len(found.quarantined) == len(bad)


def test_captions_of_ten_megabytes(shard, bounded):
    texts = [b"w" * 10 * MIB, b"a " * 5 * MIB, b" " * 10 * MIB, "漢".encode() * 3 * MIB]
    found = shard([m for i, text in enumerate(texts) for m in ((f"{i}.png", image()), (f"{i}.txt", text))])
    assert [p[1] for p in found.pairs] == ["0", "1", "3"]
    assert found.reasons() == {"2": "empty_caption"}
    assert max(len(row["facts"]) for row in found.rows) < 100_000  # what goes to the actors, escapes included


def test_deep_and_wide_json(shard, bounded):
    lists, objects = b"[" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    deep = [lists, lists + b"]" * 10_000, objects, b'{"a": ' + b"9" * 10_000 + b"}"]
    wide = json.dumps({str(i): i for i in range(100_000)} | {"caption": "found"}).encode()
    members = [m for i, data in enumerate([*deep, wide]) for m in ((f"{i}.png", image()), (f"{i}.json", data))]
    found = shard(members, caption="caption")
    assert found.reasons() == dict.fromkeys("0123", "bad_json")
    assert [p[3] for p in found.pairs] == ["found"]


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def test_odd_images_are_decoded(shard):
    exif = Image.Exif()
    exif[0x0112] = 6
    black, red = Image.new("RGB", (9, 9)), [Image.new("RGB", (9, 9), "red")] * 20
    grey16 = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    odd = {
        "cmyk": image("JPEG", mode="CMYK"),
        "grey16": encoded(grey16, "PNG"),
        "animated": encoded(black, "WEBP", save_all=True, append_images=red),
        "apng": encoded(black, "PNG", save_all=True, append_images=red),
        "turned": encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif),
        "pixel": image(size=(1, 1)),
    }
    found = shard([m for key, data in odd.items() for m in ((f"{key}.png", data), (f"{key}.txt", b"odd"))])
    assert [p[1] for p in found.pairs] == list(odd)


def test_a_png_with_a_bomb_in_its_text(shard, bounded):
    """A compressed comment of 256 MB beside one pixel."""
    pack = zlib.compressobj(1)
    comment = b"".join(pack.compress(bytes(MIB)) for _ in range(256)) + pack.flush()
    data = b"Comment\0\0" + comment
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    png = image(size=(1, 1))
    after_header = 8 + 25
    found = shard([("0.png", png[:after_header] + chunk + png[after_header:]), ("0.txt", b"a")])
    assert found.accounting.pairs == 1


@pytest.mark.parametrize("members", [[], [("README", b"no pair")], [header("d", tarfile.DIRTYPE)], bytes(1024), bytes(10240)])
def test_shards_without_pairs_are_whole(shard, members):
    found = shard(members)
    assert (found.accounting.pairs, found.accounting.broken, len(found.rows)) == (0, None, 1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"\x1f\x8b\x08\x00" + bytes(600), "compressed with gzip"),
        (b"BZh9" + bytes(600), "compressed with bzip2"),
        (b"\xfd7zXZ\0" + bytes(600), "compressed with xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
        (b"<html>Access Denied</html>" * 40, ""),
        (image(size=(64, 64)), ""),
        (b"\0" * 512 + b"x" * 512, ""),
    ],
)
def test_a_file_that_is_no_tar_says_so(shard, data, said):
    found = shard(data)
    assert (found.accounting.pairs, found.reasons()) == (1, {"": "truncated_shard"})
    assert said in found.accounting.broken == found.quarantined[0]["detail"]
