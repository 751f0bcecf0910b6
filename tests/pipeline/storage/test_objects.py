"""A name that exists holds a complete object, on local disk and on any other file system."""

import os
import threading
import time
from contextlib import nullcontext

import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.corpus.shards import find
from pipeline.storage import local
from pipeline.storage import objects as storage
from pipeline.storage.threads import AT_ONCE, in_threads


@pytest.fixture(params=["local", "file", "memory"])
def base(request, tmp_path):
    if request.param != "memory":
        yield str(tmp_path) if request.param == "local" else f"file://{tmp_path}"
        return
    yield "memory://ecif-tests"
    fs, path = storage.filesystem("memory://ecif-tests")
    if fs.exists(path):
        fs.rm(path, recursive=True)


def test_what_is_written_is_read_listed_and_described(base):
    objects = {"a.json": b"1", "d/b.json": b"22", "d/e/c.json": b"333", "d/c.tar": b""}
    for name, data in objects.items():
        storage.write_bytes(storage.join(base, name), data)
    for name, data in objects.items():
        url = storage.join(base, name)
        assert storage.exists(url)
        assert storage.read_bytes(url) == data
        assert storage.describe(url).size == len(data)
        assert storage.read_bytes(storage.describe(url).url) == data
    assert [item.size for item in storage.listing(base, ".json")] == [1, 2, 3]
    assert storage.listing(storage.join(base, "d"), ".tar") == [storage.describe(storage.join(base, "d/c.tar"))]
    assert [item.size for item in storage.glob(storage.join(base, "d/*.json"))] == [2]


def test_an_object_without_bytes_has_a_start_and_an_end(base, s3):
    for folder in (base, f"s3://{s3}/empty"):
        for data in (b"", b"abc"):
            url = storage.join(folder, f"{len(data)}")
            storage.write_bytes(url, data)
            for count in (1, 100):
                assert storage.read_start(url, count) == data[:count]
                assert storage.read_end(url, count) == data[-count:]
        with pytest.raises(FileNotFoundError):
            storage.read_start(storage.join(folder, "none"), 1)


def test_writing_again_replaces(base):
    url = storage.join(base, "a")
    for data in (b"long before", b"short", b""):
        storage.write_bytes(url, data)
        assert storage.read_bytes(url) == data
    assert len(storage.listing(base, "")) == 1


def test_a_folder_is_no_object(base):
    storage.write_bytes(storage.join(base, "d/a"), b"")
    assert storage.is_folder(storage.join(base, "d"))
    assert not storage.is_folder(storage.join(base, "d/a"))
    assert not storage.exists(storage.join(base, "d"))
    with pytest.raises(FileNotFoundError):
        storage.describe(storage.join(base, "d"))


def test_what_is_not_there(base):
    missing = storage.join(base, "none")
    assert storage.listing(missing, "") == storage.glob(storage.join(missing, "*")) == []
    assert not storage.exists(missing)
    assert not storage.is_folder(missing)
    for read in (storage.read_bytes, storage.describe):
        with pytest.raises(FileNotFoundError):
            read(missing)


def test_names_join_with_one_slash():
    assert storage.join("s3://bucket/run/", "scores", "a/0.parquet") == "s3://bucket/run/scores/a/0.parquet"


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        storage.write_bytes(str(tmp_path / "taken"), b"no file can replace a folder")
    with pytest.raises(TypeError):
        storage.write_bytes(str(tmp_path / "new"), "no bytes")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_write_that_fails_keeps_what_was_there(tmp_path):
    storage.write_bytes(str(tmp_path / "a"), b"before")
    with pytest.raises(TypeError):
        storage.write_bytes(str(tmp_path / "a"), "no bytes")
    assert os.listdir(tmp_path) == ["a"]
    assert storage.read_bytes(str(tmp_path / "a")) == b"before"


def test_an_upload_moves_the_file(base, tmp_path_factory):
    local = tmp_path_factory.mktemp("scratch") / "shard.tar"
    local.write_bytes(b"data")
    storage.upload(str(local), storage.join(base, "d/0.tar"))
    assert not local.exists()
    assert storage.read_bytes(storage.join(base, "d/0.tar")) == b"data"
    assert len(storage.listing(base, "")) == 1


def test_an_upload_that_fails_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "shard.tar").write_bytes(b"data")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.upload(str(tmp_path / "shard.tar"), str(tmp_path / "out" / "0.tar"))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("failures", [0, 3, 4])
def test_an_object_is_fetched_in_as_many_attempts_as_are_allowed(monkeypatch, failures):
    monkeypatch.setattr(local, "PAUSE_S", 0.0)
    storage.write_bytes("memory://ecif-fetch/a", b"data")
    fetch, left = MemoryFileSystem.get_file, [OSError("reset")] * failures

    def flaky(*arguments):
        if left:
            raise left.pop()
        fetch(*arguments)

    monkeypatch.setattr(MemoryFileSystem, "get_file", flaky)
    listed, expected = storage.describe("memory://ecif-fetch/a"), pytest.raises(OSError, match="reset")
    with expected if failures == 4 else nullcontext(), local.local_copy(listed, attempts=4) as file:
        assert file.read() == b"data"
    assert not left


def test_a_local_copy_is_the_whole_object(base):
    url = storage.join(base, "a")
    storage.write_bytes(url, b"0123456789")
    with local.local_copy(storage.describe(url)) as file:
        assert file.read() == b"0123456789"
        assert file.seek(4) == 4
        assert file.read() == b"456789"
    assert storage.exists(url)


@pytest.mark.parametrize("size", [0, 9, 11])
def test_a_local_copy_of_another_size_is_an_error(base, size):
    url = storage.join(base, "a")
    storage.write_bytes(url, b"0123456789")
    wrong = storage.describe(url)._replace(size=size)
    said = rf"read 10 bytes of {size}|changed .*\({size} bytes then, 10 now"
    with pytest.raises(OSError, match=said), local.local_copy(wrong):
        pass


def test_the_etag_changes_with_the_content(tmp_path):
    url = str(tmp_path / "a")
    storage.write_bytes(url, b"before")
    os.utime(url, (1, 1))
    before = storage.describe(url)
    assert storage.describe(url) == before == storage.listing(str(tmp_path), "")[0]
    storage.write_bytes(url, b"after!")
    assert storage.describe(url).size == before.size
    assert storage.describe(url).etag != before.etag


def test_the_start_of_an_object(base):
    url = storage.join(base, "a")
    storage.write_bytes(url, b"0123456789")
    assert [storage.read_start(url, count) for count in (0, 4, 10, 99)] == [b"", b"0123", b"0123456789", b"0123456789"]


def test_when_an_object_was_written(base, s3):
    for url in (storage.join(base, "a"), f"s3://{s3}/when/a"):
        before = time.time()
        storage.write_bytes(url, b"1")
        assert before - 2 < storage.describe(url).modified < time.time() + 2
        assert [item.modified for item in storage.listing(url.removesuffix("/a"), "a")] == [storage.describe(url).modified]


@pytest.mark.parametrize("count", [0, 1, AT_ONCE, 2 * AT_ONCE + 1])
def test_threads_keep_the_order(count):
    assert list(in_threads(lambda i: -i, range(count))) == [-i for i in range(count)]


def test_what_is_quick_is_not_worth_a_thread_and_what_waits_is():
    def where(i: int) -> int:
        if i == AT_ONCE + 10:
            time.sleep(0.1)
        return threading.get_ident()

    here = [found == threading.get_ident() for found in in_threads(where, range(3 * AT_ONCE))]
    assert [here[lot * AT_ONCE] for lot in range(3)] == [True] * 3, "of each lot one is tried"
    assert sum(here[:AT_ONCE]) > 1
    assert not any(here[AT_ONCE + 11 : 2 * AT_ONCE])
    few = in_threads(where, range(16))
    assert threading.get_ident() not in set(few)


def test_a_listing_of_more_objects_than_a_page_holds_is_whole(s3):
    names = [f"{i:04d}.tar" for i in range(1100)]  # S3 lists 1000 at once
    fs, folder = storage.filesystem(f"s3://{s3}/many")
    fs.pipe({f"{folder}/{name}": b"" for name in names})
    listed = [storage.listing(f"s3://{s3}/many", ".tar"), storage.glob(f"s3://{s3}/many/*.tar")]
    assert [[item.url.rsplit("/", 1)[-1] for item in found] for found in listed] == [names, names]
    assert len(find(f"s3://{s3}/many")) == 1100


def test_a_store_that_does_not_answer_is_an_error_that_names_the_object(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    url = f"s3://{s3}/run/a.json"
    for ask in (storage.read_bytes, storage.exists, storage.delete, lambda url: storage.write_bytes(url, b"")):
        with pytest.raises(OSError, match=f"^{url}: EndpointConnectionError: "):
            ask(url)
    s3fs.S3FileSystem.clear_instance_cache()
