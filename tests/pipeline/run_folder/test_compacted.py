"""The accounting of many shards in one object: read at once, and never trusted against the object of a shard."""

import threading

import pytest

from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting, json_bytes
from pipeline.sections import Reading

NAMES = ["00000", "a/00001", "a/00002", "b"]
SHARDS = [Shard(name, storage.Object(f"{name}.tar", 7, "etag")) for name in NAMES]


def accounting(name: str, **changes) -> Accounting:
    facts = {"members": 8, "in_pairs": 8, "ignored": 0, "pairs": 4, "embedded": 4, "quarantined": {}, "parts": 1}
    return Accounting(**{"shard": name, "size": 7, "etag": "etag", "sha256": "0" * 64, "broken": None} | facts | changes)


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"s3://{request.getfixturevalue('s3')}/{tmp_path.name}"


def dataset(folder: str, shards: list[Shard] = SHARDS) -> Dataset:
    return Dataset(folder, "fingerprint", shards, Reading())


@pytest.fixture
def compacted(folder) -> Dataset:
    """A dataset of which every shard is done, compacted."""
    made = dataset(folder)
    for name in NAMES:
        made.record(accounting(name, remarks={"dots": "a remark"} if name == "b" else None))
    made.compact()
    return made


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The objects that are read."""
    seen, read, lock = [], storage.read_bytes, threading.Lock()

    def note(url: str) -> bytes:
        with lock:
            seen.append(url.rpartition("/")[2])
        return read(url)

    monkeypatch.setattr(storage, "read_bytes", note)
    return seen


def test_what_is_compacted_is_read_at_once(compacted, folder, reads):
    assert dataset(folder).accounting() == compacted.accounting()
    assert reads == ["fingerprint.parquet"]
    other = dataset(folder, [Shard(shard.name, shard.source._replace(etag="other")) for shard in SHARDS])
    assert other.accounting() == {}, "the shards have changed since"


def test_an_object_that_is_another_one_now_is_read_itself(compacted, folder, reads):
    changed = accounting("a/00001", pairs=5, quarantined={"bad_json": 1})
    storage.write_bytes(compacted.accounting_url("a/00001"), json_bytes(changed._asdict()))
    storage.delete(compacted.accounting_url("b"))
    found = dataset(folder)
    expected = {**compacted.accounting(), "a/00001": changed}
    del expected["b"]
    assert found.accounting() == expected
    assert sorted(reads) == ["00001.json", "fingerprint.parquet"]
    found.compact()
    del reads[:]
    assert dataset(folder).accounting() == expected
    assert reads == ["fingerprint.parquet"], "it has been written anew"


def test_a_shard_that_is_done_later_is_taken_in(folder, reads):
    first = dataset(folder)
    for name in NAMES[:2]:
        first.record(accounting(name))
    first.compact()
    second = dataset(folder)
    for name in NAMES[2:]:
        second.write_accounting(accounting(name))
        second.remember(accounting(name))
    second.compact()
    del reads[:]
    assert list(dataset(folder).accounting().items()) == [(name, accounting(name)) for name in NAMES]
    assert reads == ["fingerprint.parquet"]


@pytest.mark.parametrize("damage", [lambda data: data[:-50], lambda data: b"no Parquet", None])
def test_without_a_sound_one_every_object_is_read_and_it_is_written_anew(compacted, folder, reads, damage):
    url = compacted.compacted_url()
    whole = storage.read_bytes(url)
    storage.delete(url) if damage is None else storage.write_bytes(url, damage(whole))
    del reads[:]
    again = dataset(folder)
    assert again.accounting() == compacted.accounting()
    assert len(reads) == 1 + len(NAMES)
    again.compact()
    assert storage.read_bytes(url) == whole, "the same objects give the same bytes"


def test_every_byte_that_flips_is_noticed(compacted, folder):
    url = compacted.compacted_url()
    whole = storage.read_bytes(url)
    for at in range(4, len(whole), max(1, len(whole) // 60)):
        storage.write_bytes(url, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert dataset(folder).accounting() == compacted.accounting(), at


def test_nothing_is_written_where_nothing_is_new(compacted, folder):
    before = storage.describe(compacted.compacted_url())
    compacted.compact()
    few = dataset(folder, SHARDS[:2])
    assert list(few.accounting()) == NAMES[:2]
    few.compact()
    assert storage.describe(compacted.compacted_url()) == before


def test_a_shard_that_changed_is_forgotten(compacted, folder):
    changed = [SHARDS[0]._replace(source=SHARDS[0].source._replace(etag="other")), *SHARDS[1:]]
    found = dataset(folder, changed)
    assert list(found.forget_changed()) == NAMES[1:]
    found.remember(accounting("00000", etag="other"))
    found.write_accounting(accounting("00000", etag="other"))
    found.compact()
    assert dataset(folder, changed).accounting()["00000"].etag == "other"
    assert "00000" not in dataset(folder).accounting()
