"""The committed demo corpus: consistent with itself, within its size limit, and what build_corpus makes."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "jobs" / "demo" / "corpus"
PAIRS = 690
SIZE = 76
ARTISTS = {
    "corpus": {"noto": "1.2.9", "noto-v1": "1.2.5", "twemoji": "1.2.5"},
    "target": {"fluent-emoji-flat": "1.2.6"},
    "test": {"emojione": "1.2.3"},
}
SHARDS = [("corpus", 0), ("corpus", 1), ("corpus", 2), ("target", 0), ("test", 0)]
URLS = {
    dataset: {f"npm:@iconify-json/{name}@{version}": name for name, version in artists.items()}
    for dataset, artists in ARTISTS.items()
}
each_shard = pytest.mark.parametrize(("dataset", "shard"), SHARDS)


def read_members(dataset: str, shard: int) -> list[tuple[tarfile.TarInfo, bytes]]:
    """A shard's members with their contents, in the tar's order."""
    with tarfile.open(CORPUS / dataset / f"{shard:05d}.tar") as tar:
        return [(member, file.read()) for member in tar if (file := tar.extractfile(member))]


def read_rows(dataset: str, shard: int) -> list[dict[str, Any]]:
    """A shard's Parquet rows."""
    rows: list[dict[str, Any]] = pq.read_table(CORPUS / dataset / f"{shard:05d}.parquet").to_pylist()
    return rows


def read_dataset(dataset: str) -> list[dict[str, Any]]:
    """The Parquet rows of all of a dataset's shards."""
    return [row for name, shard in SHARDS if name == dataset for row in read_rows(name, shard)]


def built_files(folder: Path) -> dict[str, bytes]:
    """The contents of every file under a folder that build_corpus writes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "LICENSES.md")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_files_are_exactly_the_expected_ones() -> None:
    expected = {f"{dataset}/{shard:05d}{end}" for dataset, shard in SHARDS for end in (".tar", ".parquet", "_stats.json")}
    assert set(built_files(CORPUS)) == expected


def test_total_size_is_within_the_limit() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) <= 12_000_000


@each_shard
def test_tar_headers_leave_nothing_to_vary(dataset: str, shard: int) -> None:
    members = [member for member, _ in read_members(dataset, shard)]
    keys = [f"{shard:05d}{index:04d}" for index in range(PAIRS)]
    assert [member.name for member in members] == [f"{key}.{end}" for key in keys for end in ("webp", "txt", "json")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }
    assert (CORPUS / dataset / f"{shard:05d}.tar").read_bytes()[257:265] == b"ustar\x0000"


@each_shard
def test_pairs_agree_with_their_metadata(dataset: str, shard: int) -> None:
    members = read_members(dataset, shard)
    rows = read_rows(dataset, shard)
    assert len(rows) == PAIRS
    for row, (image, data), (_, caption), (_, text) in zip(rows, members[0::3], members[1::3], members[2::3], strict=True):
        package, name = row["url"].split("#")
        artist = URLS[dataset][package]
        assert len(text) <= 512
        assert json.loads(text) == row
        assert row["key"] == image.name.removesuffix(".webp")
        assert row["caption"] == caption.decode() == name.replace("-", " ")
        assert row["uid"] == hashlib.sha256(f"{artist}/{name}".encode()).hexdigest()[:32]
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert (row["status"], row["error_message"]) == ("success", None)
        assert row["original_width"] > 0
        assert row["original_height"] > 0
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            assert (picture.format, picture.mode) == ("WEBP", "RGB")
            assert picture.size == (row["width"], row["height"]) == (SIZE, SIZE)


@each_shard
def test_stats_count_the_pairs(dataset: str, shard: int) -> None:
    stats = json.loads((CORPUS / dataset / f"{shard:05d}_stats.json").read_text())
    assert stats["count"] == stats["successes"] == PAIRS
    assert stats["failed_to_download"] == stats["failed_to_resize"] == 0
    assert stats["status_dict"] == {"success": PAIRS}


def test_every_artist_drew_the_same_names_once() -> None:
    urls = [row["url"] for dataset in ARTISTS for row in read_dataset(dataset)]
    names = {url.split("#")[1] for url in urls}
    packages = [package for dataset in URLS.values() for package in dataset]
    assert len(names) == PAIRS
    assert sorted(urls) == sorted(f"{package}#{name}" for package in packages for name in names)


def test_uids_are_unique() -> None:
    uids = [row["uid"] for dataset in ARTISTS for row in read_dataset(dataset)]
    assert len(set(uids)) == len(uids) == len(SHARDS) * PAIRS


def test_licences_name_every_package_and_the_size() -> None:
    lines = (CORPUS / "LICENSES.md").read_text().splitlines()
    for dataset, packages in URLS.items():
        for package in packages:
            (row,) = [line for line in lines if f"`{package.removeprefix('npm:')}`" in line]
            assert f"`{dataset}`" in row
            assert f"rasterised to {SIZE} px WebP" in row


@pytest.mark.network
@pytest.mark.slow
def test_rebuilding_from_npm_gives_the_committed_bytes(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    if shutil.which("npm") is None:
        pytest.skip("npm is not on PATH")
    subprocess.run([sys.executable, "-m", "jobs.demo.build_corpus", "--out", str(tmp_path)], cwd=ROOT, check=True)
    rebuilt, committed = built_files(tmp_path), built_files(CORPUS)
    assert rebuilt.keys() == committed.keys()
    # Names only: a diff of megabytes of binary would drown the message.
    assert [name for name in committed if rebuilt[name] != committed[name]] == []
