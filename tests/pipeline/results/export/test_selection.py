"""Which pairs an export copies, and what it refuses before it writes anything."""

from collections import Counter

import numpy as np
import pytest

from pipeline.errors import RunError, UserError
from pipeline.results.export import export
from pipeline.results.select import Selected
from pipeline.results.write import write_keys
from pipeline.run_folder.finished import open_run
from tests.support.exports import SELECTED, SHARDS, UID, make_corpus, write_selected
from tests.support.finished import Run, write_run
from tests.support.subsets import write_uids
from tests.support.tars import pair, read_tar, write_tar


@pytest.fixture
def twice(tmp_path, local_ray) -> Run:
    """A run of two shards with the same keys and one uid."""
    for name in ("00000", "00001"):
        write_tar(tmp_path / "corpus" / f"{name}.tar", [*pair("0", name), *pair("1", f"{name} again", uid=UID)])
    return write_run(tmp_path / "run", str(tmp_path / "corpus"))


def captions(out) -> list[list[str]]:
    """The captions of each exported shard."""
    return [[data.decode() for name, data in read_tar(path) if name.endswith(".txt")] for path in sorted(out.glob("*.tar"))]


def test_a_uid_of_a_subset_is_every_pair_that_has_it_as_for_datacomp(twice, tmp_path, capsys):
    write_uids(str(tmp_path / "s.npy"), [UID, UID, twice.uids["00001", "0"]])
    done = export(twice.folder, str(tmp_path / "s.npy"), str(tmp_path / "out"))
    assert (done.shards, done.pairs) == (2, 5)
    assert captions(tmp_path / "out") == [["00000 again"] * 2, ["00001", *["00001 again"] * 2]]
    assert f"1 uids of {tmp_path}/s.npy belong to several pairs each, such as {UID}" in capsys.readouterr().err


def test_of_pairs_with_one_uid_exactly_those_are_exported_that_were_selected(twice, tmp_path):
    selected = Selected([np.array([True, False]), np.array([False, True])])
    write_keys(str(tmp_path / "keys.parquet"), open_run(twice.folder).of_shards, selected)
    done = export(twice.folder, str(tmp_path / "keys.parquet"), str(tmp_path / "out"))
    assert (done.shards, done.pairs) == (2, 2)
    assert captions(tmp_path / "out") == [["00000"], ["00001 again"]]


def test_pairs_whose_caption_trainers_do_not_find_are_counted(tmp_path, local_ray):
    members = [m for m in [*pair("0", title="a"), *pair("1", title="b")] if m[0] != "1.txt"]
    write_tar(tmp_path / "corpus" / "00000.tar", members)
    run = write_run(tmp_path / "run", str(tmp_path / "corpus"), "title")
    done = export(run.folder, write_selected(run, tmp_path, Counter(list(run.uids))), str(tmp_path / "out"))
    assert (done.pairs, done.without_txt) == (2, 1)


def test_uids_that_the_run_does_not_know_are_named(run, tmp_path):
    write_uids(str(tmp_path / "s.npy"), [UID, "f" * 32, "e" * 32])
    with pytest.raises(UserError, match=f"2 pairs of the subset are not in the run, such as {'e' * 32}"):
        export(run.folder, str(tmp_path / "s.npy"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_to_export(run, tmp_path):
    write_uids(str(tmp_path / "s.npy"), [])
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
    with pytest.raises(RunError, match="gone or changed since they were scored"):
        export(run.folder, subset, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
