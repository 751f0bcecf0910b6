"""What is exported is what was selected, byte for byte, in shards that trainers read."""

import io
import json
import tarfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from open_clip_train.data import filter_no_caption_or_no_image, get_dataset_size, get_wds_dataset, group_by_keys_nothrow
from webdataset.tariterators import tar_file_expander, url_opener

from pipeline.corpus.shards import find
from pipeline.corpus.tar import Contents, groups
from pipeline.errors import RunError, UserError
from pipeline.results.export import _copy, _kept_by_shard, export
from pipeline.results.select import write_subset
from tests.support.finished import RESIZE, Run, write_run
from tests.support.tars import npy, pair, tar_bytes, write_tar

UID = "0123456789abcdef" * 2
SHARDS = {
    "a/00000": [
        *pair("000000000", "zero"),
        ("000000001.png", b"no image"),
        ("000000001.txt", b"quarantined: the pairs after it move up by one"),
        *pair("000000002", "two"),
        ("000000003.JSON", b'{"any": 1}'),
        ("000000003.PNG", pair("x")[0][1]),
        ("000000003.txt", b"three"),
        ("000000003.seg.npy", npy(np.arange(3))),
    ],
    "a/00007": pair("000000000", "not selected"),
    "b/00000": [
        *pair("000000000", "the key of another shard's pair"),
        *pair("d/é", "in a folder, not ASCII"),
        *pair("k" * 120, "longer than a header"),
        *pair("5", "five", uid=UID),
        *pair("5-1", "with a key that a copy would have"),
    ],
}
COPIES = {  # by shard: the key of each copied pair, and the key that it is written under
    "a/00000": [("000000002",) * 2, ("000000003",) * 2, ("000000003", "000000003-1"), ("000000003", "000000003-2")],
    "b/00000": [("000000000",) * 2, ("d/é",) * 2, ("k" * 120,) * 2, ("5", "5"), ("5", "5-2"), ("5-1",) * 2],
}
SELECTED = Counter((shard, key) for shard, copies in COPIES.items() for key, _ in copies)
KEYS = [[written for _, written in copies] for copies in COPIES.values()]
CAPTIONS = [[dict(SHARDS[shard])[f"{key}.txt"].decode() for key, _ in copies] for shard, copies in COPIES.items()]


def make_corpus(folder: Path) -> Path:
    for name, members in SHARDS.items():
        write_tar(folder / f"{name}.tar", members)
    return folder


def read(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def write_selected(run: Run, folder: Path, selected: Counter[tuple[str, str]]) -> str:
    path = str(folder / "subset.npy")
    write_subset(path, [run.uids[place] for place in selected.elements()])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("export")
    return write_run(folder / "run", str(make_corpus(folder / "corpus")))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory, local_ray) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    done = export(run.folder, write_selected(run, folder, SELECTED), str(folder / "out"))
    assert done == {"shards": 2, "pairs": SELECTED.total()}
    return folder / "out"


@pytest.fixture
def own(tmp_path) -> tuple[Path, Run]:
    """A corpus to change, and its run."""
    return make_corpus(tmp_path / "corpus"), write_run(tmp_path / "run", str(tmp_path / "corpus"))


def test_shards_are_numbered_without_gaps_and_none_is_empty(exported):
    shards = [f"0000{i}{end}" for i in range(2) for end in (".tar", "_stats.json")]
    assert sorted(path.name for path in exported.rglob("*")) == sorted([*shards, "sizes.json", "meta.json"])
    assert all(read(exported / name) for name in ("00000.tar", "00001.tar"))


def test_members_are_copied_byte_for_byte_in_their_order(exported):
    for i, (shard, copies) in enumerate(COPIES.items()):
        expected = []
        for key, written in copies:
            of_pair = [(name.removeprefix(key), data) for name, data in SHARDS[shard] if name.startswith(f"{key}.")]
            expected += [(written + (end if written == key else end.lower()), data) for end, data in of_pair]
        assert read(exported / f"0000{i}.tar") == expected


def test_headers_leave_nothing_to_vary(exported):
    for path in exported.glob("*.tar"):
        with tarfile.open(path) as tar:
            facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar}
        assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


def test_a_uid_that_is_there_twice_is_written_twice_under_a_key_of_its_own(exported):
    for i, expected in enumerate(KEYS):
        contents = Contents()
        found = list(groups(io.BytesIO((exported / f"0000{i}.tar").read_bytes()), contents))
        assert [(group.key, group.repeated) for group in found] == [(key, False) for key in expected]
        assert (contents.broken, contents.ignored) == (None, 0)


def test_counts_are_where_trainers_look_for_them(exported, run):
    counts = [len(keys) for keys in KEYS]
    assert json.loads((exported / "sizes.json").read_text()) == {"00000.tar": counts[0], "00001.tar": counts[1]}
    assert [json.loads((exported / f"0000{i}_stats.json").read_text())["successes"] for i in range(2)] == counts
    meta = json.loads((exported / "meta.json").read_text())
    assert (meta["run"], meta["pairs"], meta["shards"]) == (run.folder, sum(counts), 2)


def test_an_export_again_and_one_elsewhere_give_the_same_bytes(exported, run, tmp_path):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    subset = json.loads(before["meta.json"])["subset"]
    for out in (exported, tmp_path / "out"):
        export(run.folder, subset, str(out))
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_bytes_do_not_depend_on_when_and_by_whom_the_corpus_was_written(tmp_path):
    source, out = tmp_path / "source.tar", tmp_path / "out"
    found = {}
    for mtime in (0, 1_700_000_000):
        with tarfile.open(fileobj=io.BytesIO(tar_bytes(SHARDS["a/00000"]))) as tar, tarfile.open(source, "w") as changed:
            for member in tar:
                member.mtime, member.uname = mtime, str(mtime)
                changed.addfile(member, tar.extractfile(member))
        (shard,) = find(str(source))
        row = {"shard": "source", **shard.source._asdict(), "out": str(out), "kept": json.dumps([[0, 1], [3, 2]])}
        assert _copy(row) == {"shard": "source", "bytes": shard.source.size, "pairs": 3}
        found[mtime] = Path(f"{out}.tar").read_bytes()
    assert found[0] == found[1_700_000_000]


def test_webdataset_reads_every_pair(exported):
    shards = [str(exported / f"0000{i}.tar") for i in range(2)]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == KEYS[0] + KEYS[1]
    assert all(sample["png"][:4] == b"\x89PNG" and sample["txt"] for sample in samples)


def test_open_clip_reads_every_pair(exported):
    options = {"val_data": str(exported / "{00000..00001}.tar"), "val_num_samples": None, "batch_size": 4, "workers": 0}
    data = get_wds_dataset(
        Namespace(**options), lambda image: np.asarray(RESIZE(image)), is_train=False, tokenizer=lambda t: [t]
    )
    assert [caption for _, texts in data.dataloader for caption in texts] == CAPTIONS[0] + CAPTIONS[1]


def test_open_clip_counts_and_groups_the_pairs_as_written(exported):
    assert get_dataset_size(str(exported / "{00000..00001}.tar")) == (SELECTED.total(), 2)
    for i, keys in enumerate(KEYS):
        # Its own call of the expander fails with webdataset 1: that one marks the end of a tar by an empty sample.
        files = tar_file_expander(url_opener([{"url": str(exported / f"0000{i}.tar")}]), eof_value=None)
        samples = list(filter(filter_no_caption_or_no_image, group_by_keys_nothrow(files)))
        assert [(sample["__key__"], sample["txt"].decode()) for sample in samples] == list(zip(keys, CAPTIONS[i], strict=True))


def test_kept_by_shard_counts_a_pair_that_is_in_the_corpus_twice_once(tmp_path):
    for name in ("00000", "00001"):
        write_tar(tmp_path / "corpus" / f"{name}.tar", [*pair("0"), *pair("1", uid=UID)])
    run = write_run(tmp_path / "run", str(tmp_path / "corpus"))
    assert _kept_by_shard(run.folder, Counter([UID])) == {"00000": {1: 1}}
    assert _kept_by_shard(run.folder, Counter([UID, UID, run.uids["00001", "0"]])) == {"00000": {1: 2}, "00001": {0: 1}}


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


def test_shards_of_another_export_are_not_mixed_in(run, tmp_path):
    (tmp_path / "out").mkdir()
    write_tar(tmp_path / "out" / "00002.tar", pair("0"))
    with pytest.raises(UserError, match=r"other shards in it \(00002.tar\): export to an empty folder"):
        export(run.folder, write_selected(run, tmp_path, SELECTED), str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00002.tar"]


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
def test_a_corpus_that_is_not_what_was_scored_is_not_exported(own, tmp_path, change):
    corpus, run = own
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
