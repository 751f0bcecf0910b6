"""Truncated shards and reads that fail, through the reader: whole, quarantined with a reason, or a failed run; never silent."""

import contextlib
import hashlib
import io
import os
import random
import socket
import socketserver
import tarfile
import threading
from collections import Counter
from urllib.parse import urlsplit

import fsspec
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import RunError
from pipeline.sections import Embed
from pipeline.stages.embed.read import ReadParts
from pipeline.storage import local
from pipeline.storage import objects as storage
from tests.support.reading import FULL, collect, read_shard, row_of
from tests.support.tars import pair, tar_bytes

LIMITS = Embed(part_size=3)
TARS = {
    f: tar_bytes([m for i in range(8) for m in pair(f"é/{i}", f"caption {i}", n=i)], f)
    for f in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
}
DATA = TARS[tarfile.USTAR_FORMAT]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(local, "PAUSE_S", 0.0)


def end_of(data: bytes) -> int:
    """Where the two zero blocks end that make a tar whole."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.getmembers()
        return tar.offset + 1024


@pytest.mark.parametrize("format", TARS)
def test_no_truncation_is_silent(tmp_path, format):
    """Of 400 cuts at random offsets, over three formats of tar: what is used is right, and what is not there is said."""
    data, path = TARS[format], tmp_path / "0.tar"
    path.write_bytes(data)
    truth = read_shard(str(path), LIMITS).pairs
    (tmp_path / "0_stats.json").write_text('{"successes": 8}')
    draw = random.Random(format)
    for cut in [draw.randrange(len(data)) for _ in range(134)]:
        path.write_bytes(data[:cut])
        found = read_shard(str(path), LIMITS)
        assert found.pairs == truth[: len(found.pairs)]
        if cut >= end_of(data):
            assert (found.pairs, found.accounting.broken) == (truth, None)
            continue
        assert found.accounting.broken
        assert [q["reason"] for q in found.quarantined] == ["truncated_shard"]
        assert found.accounting.pairs + found.accounting.lost == 8


class Faulty(MemoryFileSystem):
    """Objects in memory behind a connection that fails as it is told to, one fault a read."""

    protocol = "faulty"
    store, pseudo_dirs = {}, [""]
    faults: list[str] = []
    cachable = False

    def info(self, path, **kwargs):
        info = super().info(path, **kwargs)
        return info | {"ETag": hashlib.md5(self.store[info["name"]].getvalue()).hexdigest()} if info["type"] == "file" else info

    def get_file(self, rpath, lpath, **kwargs):
        data, fault = self.cat_file(rpath), Faulty.faults.pop(0) if Faulty.faults else ""
        if fault == "changed":  # by someone else, for good
            self.pipe_file(rpath, data[:-512] + b"\1" * 512)
        kept = len(data) if fault in ("", "changed") else random.Random(fault + str(len(Faulty.faults))).randrange(len(data))
        with open(lpath, "wb") as file:
            file.write(data[:kept])
        errors = {"reset": ConnectionResetError(), "timeout": TimeoutError(), "foreign": RuntimeError("payload")}
        if fault in errors:
            raise errors[fault]


fsspec.register_implementation("faulty", Faulty, clobber=True)


def outcome(source: storage.Object):
    """The reading, or None for a failed run."""
    try:
        return collect(list(ReadParts(LIMITS, FULL)(row_of(source))))
    except RunError as error:
        assert str(error).startswith("00000: can't be read")
        return None


def test_no_failed_download_is_silent(tmp_path):
    """100 reads, each with up to as many faults as there are attempts."""
    path = tmp_path / "0.tar"
    path.write_bytes(DATA)
    truth = read_shard(str(path), LIMITS)
    draw, ends = random.Random(0), Counter()
    for i in range(100):
        url = f"faulty://shards/{i}.tar"
        storage.write_bytes(url, DATA)
        source = storage.describe(url)
        faults = draw.choices(
            ["short", "reset", "timeout", "foreign", "changed"], [4, 2, 2, 2, 1], k=draw.randint(1, local.ATTEMPTS)
        )
        Faulty.faults = list(faults)
        found = outcome(source)
        assert (found is not None) == (len(faults) < local.ATTEMPTS and "changed" not in faults)
        if found is not None:
            assert (found.pairs, found.quarantined) == (truth.pairs, [])
            assert [row["pixels"] for row in found.rows] == [row["pixels"] for row in truth.rows]
        ends["whole" if found else "failed"] += 1
    assert min(ends["whole"], ends["failed"]) > 10


def test_a_short_download_is_no_copy():
    storage.write_bytes("faulty://shards/short.tar", DATA)
    Faulty.faults = ["short"]
    with pytest.raises(OSError, match=rf"read \d+ bytes of {len(DATA)}"):
        local.local_copy(storage.describe("faulty://shards/short.tar")).__enter__()


def test_no_failed_local_read_is_silent(tmp_path, monkeypatch):
    """100 reads, among whose calls some fail or come back empty, in the middle of a shard too."""
    path = tmp_path / "0.tar"
    path.write_bytes(DATA)
    source = storage.describe(str(path))
    truth = outcome(source)
    draw, ends, faults = random.Random(0), Counter(), Counter()
    monkeypatch.setattr(local, "BUFFER", 2048)  # many calls

    class Failing(io.FileIO):
        def readinto(self, buffer):
            kind = draw.choices(["", "error", "empty", "short"], [1, rate, rate, 5 * rate])[0]
            faults[kind] += 1
            if kind == "error":
                raise OSError(5, "Input/output error")
            return 0 if kind == "empty" else super().readinto(memoryview(buffer)[: 1 if kind == "short" else None])

    def opened(file, mode="r", **how):
        return Failing(file, mode) if how.get("buffering") == 0 else open(file, mode, **how)

    monkeypatch.setattr(local, "open", opened, raising=False)
    for i in range(100):
        rate = 0.001 * (1 + i % 20)
        found = outcome(source)
        assert found is None or found == truth
        ends["whole" if found else "failed"] += 1
    assert min(ends["whole"], ends["failed"]) > 10
    assert min(faults.values()) > 10


class Cutting(socketserver.ThreadingTCPServer):
    """A way to the S3 server on which the connection breaks after some bytes of an answer."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, server: tuple[str, int]):
        super().__init__(("127.0.0.1", 0), _Cut)
        self.target, self.cuts = server, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Cut(socketserver.BaseRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError), socket.create_connection(self.server.target) as there:
            threading.Thread(target=self._forward, args=(self.request, there), daemon=True).start()
            sent = 0
            while answer := there.recv(4096):
                sent += len(answer)
                if self.server.cuts and sent > self.server.cuts[0]:
                    self.server.cuts.pop(0)
                    return
                self.request.sendall(answer)

    def _forward(self, here, there):
        with contextlib.suppress(OSError):
            while asked := here.recv(4096):
                there.sendall(asked)


def test_a_broken_connection_to_s3_is_not_silent(s3, tmp_path, monkeypatch):
    storage.write_bytes(f"s3://{s3}/cut/0.tar", DATA)
    source = storage.describe(f"s3://{s3}/cut/0.tar")
    truth = outcome(source)
    there = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    draw = random.Random(0)
    with Cutting((there.hostname, there.port)) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{way.server_address[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        cuts = 0
        for _ in range(10):
            way.cuts = [draw.randrange(len(DATA) // 2) + 2000 for _ in range(draw.randint(1, 4))]
            asked = len(way.cuts)
            found = outcome(source)
            assert found is None or found == truth
            cuts += asked - len(way.cuts)
        way.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()
    assert cuts > 10
    assert truth.accounting.pairs == 8
