"""The reader: a shard in, its parts out, every member and pair counted, a failed read begun anew."""

import codecs
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import Embed
from pipeline.errors import RunError
from pipeline.run_folder.tables import parquet_bytes
from pipeline.stages.embed import read
from pipeline.stages.embed.read import ReadParts
from pipeline.stages.embed.rows import Part
from pipeline.storage import local
from pipeline.storage import objects as storage
from tests.support.reading import FULL, read_shard, row_of
from tests.support.tars import header, image, pair, tar_bytes, write_tar

PIXELS = image()
NAMES = st.one_of(
    st.builds(
        "{}{}.{}".format,
        st.sampled_from(["", "d/", "../", "/", "./", "v1.5/", "é/"]),
        st.sampled_from(["0", "1", "2", "00", "", " ", "a b", "漢字"]),
        st.sampled_from(["jpg", "JPG", "png", "txt", "Txt", "json", "seg.png", "", "tar"]),
    ),
    st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=120),
)
CONTENTS = st.one_of(st.sampled_from([PIXELS, b"a caption", b'{"uid": "x"}', b""]), st.binary(max_size=40))
FILES = st.tuples(NAMES, CONTENTS)
KINDS = st.sampled_from([tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
MEMBERS = st.lists(st.one_of(FILES, FILES, FILES, st.builds(header, NAMES, KINDS)), max_size=30)


@pytest.fixture
def quick(monkeypatch):
    """No pause between attempts."""
    monkeypatch.setattr(local, "PAUSE_S", 0.0)


@given(members=MEMBERS, format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), part_size=st.integers(1, 5))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_any_sequence_of_members_is_accounted_for(tmp_path, members, format, part_size):
    """`collect` holds the books: members = parts of pairs + ignored, pairs = readable + quarantined, each index once."""
    (tmp_path / "0.tar").write_bytes(tar_bytes(members, format))
    found = read_shard(str(tmp_path / "0.tar"), Embed(part_size=part_size))
    assert found.accounting.members == len(members)
    assert found.accounting.ignored >= sum(isinstance(member, tarfile.TarInfo) for member in members)
    assert found.accounting.broken is None
    first = Counter(p[1] for p in found.pairs)
    assert not first or first.most_common(1)[0][1] == 1  # no key twice among what is used


@given(members=MEMBERS, data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_any_damage_is_accounted_for(tmp_path, members, data):
    whole = tar_bytes(members)
    at = data.draw(st.integers(0, len(whole) - 1))
    damage = data.draw(st.binary(min_size=1, max_size=600))
    (tmp_path / "0.tar").write_bytes(whole[:at] + damage + whole[at + len(damage) :])
    read_shard(str(tmp_path / "0.tar"), Embed(part_size=4))


def test_parts_are_of_the_asked_size_and_in_order(tmp_path):
    url = str(write_tar(tmp_path / "0.tar", [m for i in range(7) for m in pair(str(i), f"caption {i}")]))
    found = read_shard(url, Embed(part_size=3))
    assert [len(Part.from_row(row).pairs) for row in found.rows] == [3, 3, 1]
    assert [p[1::2] for p in found.pairs] == [[str(i), f"caption {i}"] for i in range(7)]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_local_shard_that_changes_while_it_is_read_is_never_finished(tmp_path, quick, after):
    path = write_tar(tmp_path / "0.tar", [m for i in range(9) for m in pair(str(i), "x" * 200_000)])
    parts = ReadParts(Embed(part_size=3), FULL)(row_of(storage.describe(str(path))))
    given = [next(parts) for _ in range(after)]
    path.write_bytes(path.read_bytes()[: 5 * 200_000])
    with pytest.raises(RunError, match=r"00000: can't be read: OSError: .*(has changed|read \d+ bytes of)"):
        given += list(parts)
    assert not any(Part.from_row(row).accounting for row in given)


def test_a_shard_that_is_replaced_by_one_of_the_same_size_is_never_finished(tmp_path, quick):
    path = write_tar(tmp_path / "0.tar", [m for i in range(4) for m in pair(str(i))])
    parts = ReadParts(Embed(part_size=2), FULL)(row_of(storage.describe(str(path))))
    next(parts)
    os.utime(path, (1, 1))
    with pytest.raises(RunError, match="has changed since it was listed"):
        list(parts)


@pytest.mark.parametrize("base", ["", "memory://ecif-reader/"])
def test_a_shard_that_changed_since_it_was_listed_gives_no_part(tmp_path, quick, base):
    url = f"{base}{tmp_path}/0.tar"
    storage.write_bytes(url, tar_bytes([m for i in range(4) for m in pair(str(i))]))
    listed = storage.describe(url)._replace(etag="before")
    parts = ReadParts(Embed(part_size=1), FULL)(row_of(listed))
    with pytest.raises(RunError, match="has changed since it was listed"):
        next(parts)


def test_a_failed_read_is_begun_anew_and_no_part_is_given_twice(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(read.time, "perf_counter", lambda: 0.0)
    url = str(write_tar(tmp_path / "0.tar", [m for i in range(9) for m in pair(str(i))]))
    truth = read_shard(url, Embed(part_size=2))
    real, calls = read.read_pair, Counter()

    def failing(file, group, *rest):
        calls[group.index] += 1
        if calls[group.index] == 1 and group.index in (0, 5, 8):
            raise OSError("Input/output error")
        return real(file, group, *rest)

    monkeypatch.setattr(read, "read_pair", failing)
    assert read_shard(url, Embed(part_size=2)) == truth
    assert calls[0] == 4  # once an attempt


def test_attempts_are_bounded_and_the_error_names_the_shard(tmp_path, quick):
    gone = storage.Object(str(tmp_path / "gone.tar"), 10, "x")
    with pytest.raises(RunError, match=r"^a/00007: can't be read: FileNotFoundError: .*gone.tar.* \(4 attempts"):
        list(ReadParts(Embed(), FULL)(row_of(gone, shard="a/00007")))


@pytest.mark.parametrize(("successes", "lost"), [(None, 0), (3, 0), (5, 2), (1, 0)])
def test_what_img2dataset_counted_is_compared(tmp_path, successes, lost):
    url = str(write_tar(tmp_path / "0.tar", [m for i in range(3) for m in pair(str(i))]))
    if successes is not None:
        (tmp_path / "0_stats.json").write_text(json.dumps({"count": 9, "successes": successes}))
    accounting = read_shard(url).accounting
    assert (accounting.successes, accounting.lost) == (successes, lost)


VALUES = ["null", "NaN", "Infinity", "-1", "1.5", "true", "[3]", "{}", '"3"', '"many"', "9" * 5000]


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "3", "NaN", "[" * 100_000, "\ufffe", *VALUES])
def test_a_count_that_says_nothing_counts_as_absent_and_is_said(tmp_path, text):
    url = str(write_tar(tmp_path / "0.tar", pair("0")))
    (tmp_path / "0_stats.json").write_text(f'{{"successes": {text}}}' if text in VALUES else text)
    accounting = read_shard(url).accounting
    assert (accounting.successes, accounting.lost) == (None, 0)
    assert accounting.remarks["stats"].startswith("its _stats.json ")


@pytest.mark.parametrize("count", ["3", "3.0"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_count_is_read_as_editors_and_spreadsheets_write_it(tmp_path, mark, count):
    url = str(write_tar(tmp_path / "0.tar", pair("0")))
    (tmp_path / "0_stats.json").write_bytes(mark + b'{"successes": %s}' % count.encode())
    accounting = read_shard(url).accounting
    assert (accounting.successes, accounting.remarks) == (3, None)


def test_uids_are_those_of_the_sidecar_where_they_are_asked_for(tmp_path):
    url = str(write_tar(tmp_path / "0.tar", [*pair("0", uid="a" * 32), *pair("1", uid="b" * 32)]))
    table = pa.table({"key": ["1", "0", "failed"], "uid": ["d" * 32, "c" * 32, None]})
    Path(tmp_path / "0.parquet").write_bytes(parquet_bytes(table))
    assert [p[2] for p in read_shard(url).pairs] == ["a" * 32, "b" * 32]
    beside = storage.describe(str(tmp_path / "0.parquet"))
    found = read_shard(url, sidecar=beside)
    assert [p[2] for p in found.pairs] == ["c" * 32, "d" * 32]
    assert found.accounting.sidecar[0] == beside.etag
    (tmp_path / "0.parquet").write_bytes(parquet_bytes(pa.table({"key": ["000", "001"], "uid": ["c" * 32, "d" * 32]})))
    with pytest.raises(RunError, match=r"00000: no key of its \.parquet is in the tar, which has '1' last"):
        read_shard(url, sidecar=storage.describe(str(tmp_path / "0.parquet")))


def test_a_broken_shard_is_one_quarantined_pair_that_says_why(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"<html>Access Denied</html>" * 100)
    (only,) = read_shard(str(tmp_path / "0.tar")).quarantined
    assert (only["index"], only["key"], only["reason"]) == (0, "", "truncated_shard")


def test_a_reader_imports_no_torch():
    """It takes two seconds of each of many processes, and open_clip four more."""
    heavy = "[name for name in ('torch', 'torchvision', 'open_clip', 'transformers', 'ecif') if name in sys.modules]"
    program = f"import sys, pipeline.stages.embed.read; print({heavy})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
