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

from pipeline.corpus.tar import Contents, read_groups
from pipeline.results.export import export
from tests.support.exports import COPIES, SELECTED, SHARDS, caption, write_selected
from tests.support.finished import RESIZE, write_run
from tests.support.tars import read_tar, tar_bytes

KEYS = [[written for _, written in copies] for copies in COPIES.values()]
CAPTIONS = [[caption(shard, key) for key, _ in copies] for shard, copies in COPIES.items()]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    done = export(run.folder, write_selected(run, folder, SELECTED), str(folder / "out"))
    assert (done.shards, done.pairs) == (2, SELECTED.total())
    return folder / "out"


def test_shards_are_numbered_without_gaps_and_none_is_empty(exported):
    shards = [f"0000{i}{end}" for i in range(2) for end in (".tar", "_stats.json")]
    assert sorted(path.name for path in exported.rglob("*")) == sorted([*shards, "sizes.json", "meta.json"])
    assert all(read_tar(exported / name) for name in ("00000.tar", "00001.tar"))


def test_members_are_copied_byte_for_byte_in_their_order(exported):
    for i, (shard, copies) in enumerate(COPIES.items()):
        expected = []
        for key, written in copies:
            of_pair = [(name.removeprefix(key), data) for name, data in SHARDS[shard] if name.startswith(f"{key}.")]
            expected += [(written + (end if written == key else end.lower()), data) for end, data in of_pair]
        assert read_tar(exported / f"0000{i}.tar") == expected


def test_headers_leave_nothing_to_vary(exported):
    for path in exported.glob("*.tar"):
        with tarfile.open(path) as tar:
            facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar}
        assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


def test_a_uid_that_is_there_twice_is_written_twice_under_a_key_of_its_own(exported):
    for i, expected in enumerate(KEYS):
        contents = Contents()
        found = list(read_groups(io.BytesIO((exported / f"0000{i}.tar").read_bytes()), contents))
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


def test_bytes_do_not_depend_on_when_and_by_whom_the_corpus_was_written(tmp_path, local_ray):
    written = set()
    for mtime in (0, 1_700_000_000):
        folder = tmp_path / str(mtime)
        folder.mkdir()
        source = folder / "source.tar"
        with tarfile.open(fileobj=io.BytesIO(tar_bytes(SHARDS["a/00000"]))) as tar, tarfile.open(source, "w") as changed:
            for member in tar:
                member.mtime, member.uname = mtime, str(mtime)
                changed.addfile(member, tar.extractfile(member))
        run = write_run(folder / "run", str(source))
        places = Counter({("source", "000000000"): 1, ("source", "000000003"): 2})
        assert export(run.folder, write_selected(run, folder, places), str(folder / "out")).pairs == 3
        written.add((folder / "out" / "00000.tar").read_bytes())
    assert len(written) == 1


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
