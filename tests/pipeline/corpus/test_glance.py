"""A few shards tell, before anything is embedded, whether a run is possible and what its uids are."""

import pyarrow as pa
import pytest

from pipeline.corpus import glance as looking
from pipeline.corpus import shards, sidecar
from pipeline.corpus.glance import Glance, glance
from pipeline.run_folder.tables import parquet_bytes
from pipeline.sections import Embed
from tests.support.tars import pair, write_tar

UID = "0123456789abcdef" * 2


@pytest.fixture
def look(tmp_path):
    """Writes shards of so many pairs each and looks at them; other members may be given."""

    def write(sizes: list[int], uids: bool = False, **others: list[tuple[str, bytes]]) -> Glance:
        for i, size in enumerate(sizes):
            members = [m for n in range(size) for m in pair(f"{n:03d}", uid=f"{i * 1000 + n:032x}")]
            write_tar(tmp_path / f"{i:05d}.tar", members)
        for name, members in others.items():
            write_tar(tmp_path / f"{name}.tar", members)
        found = shards.find(str(tmp_path))
        return glance(found, "first_dot", sidecar.find(found, [], uids), Embed())

    return write


@pytest.mark.parametrize("count", [1, 3, 20])
def test_shards_of_one_pair_are_refused(look, count):
    found = look([1] * count)
    assert found.impossible.startswith("corpus.shards: one pair a shard, such as 00000: a pair is contrasted with the others")
    assert found.said(16) == []


def test_shards_of_one_pair_because_of_dots_are_told_from_others(look):
    scans = [m for i in range(5) for m in pair(f"scan.{i}")]
    found = look([], a=scans, b=scans)
    assert found.impossible.startswith(
        "corpus.shards: one pair a shard, such as a: 15 members are swallowed by a key that ends "
    )
    assert "key: last_dot" in found.impossible


@pytest.mark.parametrize("sizes", [[2, 2], [1, 2], [1] * 8 + [50], ([1] * 4 + [40]) * 6])
def test_other_shards_are_not(look, sizes):
    assert look(sizes).impossible == ""


def test_shards_smaller_than_the_batch_are_counted(look):
    (line,) = look([40, 5, 40, 12]).said(30)
    assert line.startswith("about 2 of 4 shards hold fewer pairs than batch_size 30, such as 00001 with ~6: ")


def test_shards_that_just_hold_a_batch_are_not(look):
    assert look([30, 32, 29, 36]).said(30) == []


def test_pairs_are_estimated_where_only_the_beginning_is_read(look, monkeypatch):
    monkeypatch.setattr(looking, "HEAD", 40_000)
    (line,) = look([100, 60, 3]).said(80)
    assert line.startswith("about 1 of 3 shards hold fewer pairs than batch_size 80, such as 00002 with ~3: ")


def test_uids_are_counted(look):
    others = {
        "a": [*pair("0", uid=UID), *pair("1", uid=UID.upper()), *pair("2", uid=12), *pair("3")],
        "b": [*pair("0", uid=UID), *[member for member in pair("1") if not member[0].endswith("json")], ("2.json", b"{")],
    }
    found = look([6], **others).uids
    assert found == (13, 3, 1, "'12' (a, 2)", 3, UID)


def test_uids_of_a_sidecar_are_counted(look, tmp_path):
    for name, uids in (("00000", ["1-2", UID]), ("a", [None, UID])):
        table = pa.table({"key": ["000", "001"], "uid": pa.array(uids, pa.string())})
        (tmp_path / f"{name}.parquet").write_bytes(parquet_bytes(table))
    found = look([2], True, a=[m for key in ("000", "001") for m in pair(key, uid="f" * 32)]).uids
    assert found == (4, 1, 1, "'1-2' (00000, 000)", 2, UID)


def test_what_can_not_be_read_is_passed_over(look, tmp_path):
    (tmp_path / "z0.tar").write_bytes(b"")
    (tmp_path / "z1.tar").write_bytes(b"no tar")
    found = look([3, 3])
    assert (found.impossible, found.uids.pairs) == ("", 6)
    (tmp_path / "00000.tar").unlink()
    assert glance(found.shards, "first_dot", None, Embed()).uids.pairs == 3
