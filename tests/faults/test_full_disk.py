"""A disk that is full ends a run with one line; when there is room, the same command goes on."""

import subprocess

import pytest

from pipeline import storage
from tests.support.run_folders import result


@pytest.fixture
def disk(tmp_path):
    """A disk of a given size, which can be changed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: str, *options: str) -> subprocess.CompletedProcess:
        mount = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
        return subprocess.run(mount, capture_output=True, text=True)

    mounted = resize("1m")
    if mounted.returncode:
        pytest.skip(f"a disk of its own can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder, lambda size: resize(size, "remount").check_returncode()
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_an_object_that_has_no_room_is_an_error_with_its_name_and_leaves_nothing(disk):
    folder, resize = disk
    url, before, after = f"{folder}/run/object.json", b"a" * 1000, b"b" * 2_000_000
    storage.write_bytes(url, before)
    with pytest.raises(OSError, match=f"{url}: .*No space left on device"):
        storage.write_bytes(url, after)
    assert storage.read_bytes(url) == before
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["object.json"]
    resize("4m")
    storage.write_bytes(url, after)
    assert storage.read_bytes(url) == after


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(ecif, configure, disk, pairs, whole):
    folder, resize = disk
    run = folder / "run"
    config = configure(run, pairs)
    places = {"44k": ("features", "shards", "targets"), "112k": ("heads",)}  # embed's objects need 72k, heads 44k more
    for size in places:
        resize(size)
        ended = ecif("run", config).wait()
        assert (ended.code, ended.out) == (1, "")
        assert ended.last.startswith(tuple(f"ecif: the run failed: {run}/{place}/" for place in places[size])), ended
        assert ended.last.endswith("No space left on device (what is written is whole; the same command resumes)")
        assert "Traceback" not in "\n".join(ended.lines)
        there = result(run)
        assert there and there.items() < whole.items(), "nothing half-written has a name"
        assert not list(run.rglob("*.tmp"))
    resize("1m")
    ended = ecif("run", config).wait()
    assert ended.code == 0, ended
    assert result(run) == whole
