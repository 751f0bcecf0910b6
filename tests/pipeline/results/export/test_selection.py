"""Which pairs an export copies, and what it refuses before it writes anything."""

from collections import Counter

import pytest

from pipeline.errors import RunError, UserError
from pipeline.results.export import export
from pipeline.results.select import write_subset
from tests.support.exports import SELECTED, SHARDS, UID, make_corpus, write_selected
from tests.support.finished import write_run
from tests.support.tars import pair, read_tar, write_tar


def test_a_uid_that_the_corpus_holds_twice_is_one_pair_its_first(tmp_path, local_ray):
    for name in ("00000", "00001"):
        write_tar(tmp_path / "corpus" / f"{name}.tar", [*pair("0", name), *pair("1", name, uid=UID)])
    run = write_run(tmp_path / "run", str(tmp_path / "corpus"))
    write_subset(str(tmp_path / "s.npy"), [UID, UID, run.uids["00001", "0"]])
    done = export(run.folder, str(tmp_path / "s.npy"), str(tmp_path / "out"))
    assert (done.shards, done.pairs) == (2, 3)
    written = [[m for m in read_tar(tmp_path / "out" / f"0000{i}.tar") if m[0].endswith(".txt")] for i in range(2)]
    assert written == [[("1.txt", b"00000"), ("1-1.txt", b"00000")], [("0.txt", b"00001")]]


def test_uids_that_the_run_does_not_know_are_named(run, tmp_path):
    write_subset(str(tmp_path / "s.npy"), [UID, "f" * 32, "e" * 32])
    with pytest.raises(UserError, match=f"2 uids of the subset are not in the run, such as {'e' * 32}"):
        export(run.folder, str(tmp_path / "s.npy"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_to_export(run, tmp_path):
    write_subset(str(tmp_path / "s.npy"), [])
    with pytest.raises(UserError, match="empty"):
        export(run.folder, str(tmp_path / "s.npy"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="no subset"):
        export(run.folder, str(tmp_path / "none.npy"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="no finished run"):
        export(str(tmp_path), str(tmp_path / "s.npy"), str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["00002.tar", "below/00000.tar"])
def test_shards_of_another_export_are_not_mixed_in(run, tmp_path, name):
    write_tar(tmp_path / "out" / name, pair("0"))
    with pytest.raises(UserError, match=rf"other shards in it \({name}\): export to an empty folder"):
        export(run.folder, write_selected(run, tmp_path, SELECTED), str(tmp_path / "out"))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [tmp_path / "out" / name]


def test_the_corpus_itself_is_never_written_over(tmp_path):
    for name in ("00000", "00001"):
        write_tar(tmp_path / "corpus" / f"{name}.tar", [*pair("0", name), *pair("1")])
    run = write_run(tmp_path / "run", str(tmp_path / "corpus"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "corpus").iterdir()}
    subset = write_selected(run, tmp_path, Counter([("00000", "0"), ("00001", "0")]))
    with pytest.raises(UserError, match="other shards in it"):
        export(run.folder, subset, str(tmp_path / "corpus"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "corpus").iterdir()} == before


@pytest.mark.parametrize("change", ["other places", "gone", "renamed"])
def test_a_corpus_that_is_not_what_was_scored_is_not_exported(tmp_path, change):
    corpus = make_corpus(tmp_path / "corpus")
    run = write_run(tmp_path / "run", str(corpus))
    subset = write_selected(run, tmp_path, SELECTED)
    if change == "other places":
        write_tar(corpus / "b" / "00000.tar", [*SHARDS["b/00000"][3:], *SHARDS["b/00000"][:3]])
    elif change == "gone":
        (corpus / "b" / "00000.tar").unlink()
    else:
        (corpus / "a").rename(corpus / "c")
    with pytest.raises(RunError, match="changed since the run"):
        export(run.folder, subset, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
