"""What is exported is what was selected, byte for byte, in shards that trainers read."""

import io
import json
import re
import shlex
import tarfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from open_clip_train.data import filter_no_caption_or_no_image, get_dataset_size, get_wds_dataset, group_by_keys_nothrow
from webdataset.tariterators import tar_file_expander, url_opener

from pipeline import storage
from pipeline.corpus import sidecar
from pipeline.corpus.shards import find
from pipeline.corpus.tar import Contents, read_groups
from pipeline.results.export import WebDataset, export
from pipeline.run_folder.finished import open_run
from tests.support.exports import COPIES, SELECTED, SHARDS, caption, write_selected
from tests.support.finished import RESIZE, write_run
from tests.support.tars import read_tar, tar_bytes

KEYS = [[f"{shard:05d}-{i:06d}" for i in range(len(copies))] for shard, copies in enumerate(COPIES.values())]
CAPTIONS = [[caption(shard, key) for key, _ in copies] for shard, copies in COPIES.items()]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    done = export(run.folder, write_selected(run, folder, SELECTED), str(folder / "out"))
    assert (done.shards, done.pairs) == (2, SELECTED.total())
    return folder / "out"


def test_shards_are_numbered_without_gaps_and_none_is_empty(exported):
    shards = [f"0000{i}{end}" for i in range(2) for end in (".tar", ".parquet", "_stats.json")]
    assert sorted(path.name for path in exported.rglob("*")) == sorted([*shards, "sizes.json", "meta.json"])
    assert all(read_tar(exported / name) for name in ("00000.tar", "00001.tar"))


def test_members_are_copied_byte_for_byte_in_their_order(exported):
    for i, (shard, copies) in enumerate(COPIES.items()):
        expected = []
        for (key, _), written in zip(copies, KEYS[i], strict=True):
            of_pair = [(name.removeprefix(key), data) for name, data in SHARDS[shard] if name.startswith(f"{key}.")]
            expected += [(written + end.lower(), data) for end, data in of_pair]
        assert read_tar(exported / f"0000{i}.tar") == expected


def test_every_key_is_plain_and_in_the_export_once(exported):
    keys = [name.partition(".")[0] for i in range(2) for name, _ in read_tar(exported / f"0000{i}.tar")]
    assert all(re.fullmatch(r"[0-9]{5}-[0-9]{6}", key) for key in keys)
    assert len(set(keys)) == SELECTED.total()


def test_a_table_says_which_pair_a_key_is_and_has_its_columns(exported, run):
    columns = {(row["shard"], row["key"]): row for row in open_run(run.folder).scores().to_pylist()}
    for i, (shard, copies) in enumerate(COPIES.items()):
        rows = pq.read_table(exported / f"0000{i}.parquet").to_pylist()
        assert [row.pop("key") for row in rows] == KEYS[i]
        for row, (key, _) in zip(rows, copies, strict=True):
            assert row == {"corpus_key" if name == "key" else name: v for name, v in columns[shard, key].items()}
            assert (row["shard"], row["corpus_key"], row["uid"]) == (shard, key, run.uids[shard, key])


def test_that_table_is_a_sidecar_of_the_export(exported):
    shards = find(str(exported))
    sidecars = sidecar.find(shards, ["corpus_key", "shard", "index"], True)
    found = sidecar.columns(sidecars, "00001", KEYS[1])
    assert found["sidecar_corpus_key"].to_pylist() == [key for key, _ in COPIES["b/00000"]]


def test_headers_leave_nothing_to_vary(exported):
    for path in exported.glob("*.tar"):
        with tarfile.open(path) as tar:
            facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar}
        assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


def test_a_pair_that_is_there_twice_is_written_twice_under_a_key_of_its_own(exported):
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


def command(out: str, sizes: list[int], model: str = "ViT-B-32", batch: int = 256, loss: str = "clip") -> dict[str, str]:
    """The options of the command that an export into a folder is trained by."""
    origin = {"run": "run", "subset": "subset.npy", "model": model, "batch_size": batch, "loss": loss}
    install, trains = WebDataset.finish(out, {f"{i:05d}.tar": n for i, n in enumerate(sizes)}, origin).splitlines()
    assert install.startswith("pip install 'open_clip_torch[training]>=3.3,<4'  # in an environment of its own: ")
    program, options = shlex.split(trains)[:3], shlex.split(trains)[3:]
    assert program == ["python", "-m", "open_clip_train.main"]
    assert (options[-1] == "--siglip") == (loss == "siglip")
    options = options[: len(options) // 2 * 2]
    return dict(zip(options[::2], options[1::2], strict=True))


def test_the_command_has_what_the_trainer_needs(tmp_path):
    found = command(f"{tmp_path}/my export/", [300] * 8, "local-dir:/models/my model", 128, "siglip")
    assert found == {
        "--model": "local-dir:/models/my model",
        "--dataset-type": "webdataset",
        "--train-data": f"{tmp_path}/my export/{{00000..00007}}.tar",
        "--train-num-samples": "2400",
        "--batch-size": "128",
        "--workers": "4",
    }


@pytest.mark.parametrize(
    ("sizes", "workers", "batch"),
    [
        ([500], 1, 256),
        ([500] * 3, 3, 256),
        ([100] * 9, 3, 256),
        ([1, 300, 300, 300], 2, 256),
        ([40, 30], 1, 70),
        ([256] * 5, 4, 256),
    ],
)
def test_every_loading_process_can_fill_a_batch_whichever_shards_it_gets(tmp_path, sizes, workers, batch):
    found = command(str(tmp_path), sizes)
    assert (found["--workers"], found["--batch-size"]) == (str(workers), str(batch))


@pytest.mark.parametrize("slash", ["", "/"])
def test_on_s3_the_command_reads_by_a_pipe(s3, slash):
    found = command(f"s3://{s3}/filtered{slash}", [300, 300])
    assert found["--train-data"] == f"pipe:aws s3 cp s3://{s3}/filtered/{{00000..00001}}.tar -"
    assert storage.exists(f"s3://{s3}/filtered/sizes.json")
    found = command(f"s3://{s3}/two words{slash}", [300, 300])
    assert found["--train-data"] == f"pipe:aws s3 cp 's3://{s3}/two words/{{00000..00001}}.tar' -"
