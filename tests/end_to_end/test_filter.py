"""From a finished run to filtered shards, by the commands a user types."""

import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from jobs.cli import main
from pipeline.run_folder.finished import open_run
from tests.support.tars import read_tar


def ecif(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["ecif", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code


def test_select_and_export_keep_exactly_the_best_byte_for_byte(finished, corpus, tmp_path, monkeypatch, capsys):
    subset, out = tmp_path / "subset.npy", tmp_path / "filtered"
    ecif(monkeypatch, "select", finished[0].run, "--by", "misalignment", "--keep", 0.5, "--out", subset)
    ecif(monkeypatch, "export", finished[0].run, "--subset", subset, "--out", out)
    table = open_run(finished[0].run).scores()
    best = sorted(zip(table["misalignment"].to_pylist(), table["uid"].to_pylist(), strict=True))[:54]
    wanted = {uid for _, uid in best}
    assert len(np.load(subset)) == 54
    originals = {name: data for tar in (corpus / "corpus").glob("*.tar") for name, data in read_tar(tar)}
    keys = {row["key"] for row in table.to_pylist() if row["uid"] in wanted}
    tars = sorted(out.glob("*.tar"))
    assert [t.name for t in tars] == [f"{i:05d}.tar" for i in range(len(tars))]
    copied = [member for tar in tars for member in read_tar(tar)]
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.ParquetFile(path).read().to_pylist()]
    was = {row["key"]: row["corpus_key"] for row in rows}
    assert set(was.values()) == keys
    assert {name.split(".")[0] for name, _ in copied} == was.keys()
    assert len(copied) == 3 * 54
    new = [(*name.split(".", 1), data) for name, data in copied]
    assert all(originals[f"{was[key]}.{suffix}"] == data for key, suffix, data in new)
    assert f"--train-num-samples {54}" in capsys.readouterr().out
    samples = list(webdataset.WebDataset([str(t) for t in tars], shardshuffle=False))
    assert {s["__key__"] for s in samples} == was.keys()


def test_a_column_that_is_not_there_is_named(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ecif", "select", finished[0].run, "--by", "beauty", "--keep", "0.5", "--out", "x"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    assert "no column 'beauty'" in capsys.readouterr().err


def test_what_the_user_leaves_open_is_what_the_run_chose(finished, tmp_path, monkeypatch, capsys):
    ecif(monkeypatch, "select", finished[0].run, "--out", tmp_path / "subset.npy")
    found = open_run(finished[0].run)
    chosen, table = found.checkpoints[0].targets["clean"]["filter"], found.scores()
    count = round(chosen["keep"] * len(table))
    ranked = sorted(zip((-table["filter_clean"].to_numpy()).tolist(), table["uid"].to_pylist(), strict=True))
    kept = [f"{high:016x}{low:016x}" for high, low in np.load(tmp_path / "subset.npy").tolist()]
    assert kept == sorted(uid for _, uid in ranked[:count])
    assert f"{count} pairs kept by filter_clean" in capsys.readouterr().err


def test_the_filter_ranks_by_misalignment_and_never_drops_more_than_the_expected_share(finished):
    found = open_run(finished[0].run)
    facts, table = found.checkpoints[0].targets["clean"], found.scores()
    chosen = facts["filter"]
    assert chosen["keep"] in (1, pytest.approx(1 - (facts["misaligned"] or 0), abs=0.1))
    assert 0 <= chosen["asked"] <= 1
    score, aligned = table["filter_clean"].to_numpy(), -table["misalignment"].to_numpy()
    # The sample is the whole corpus here, but its pairs share their batches with others than the columns' do.
    assert np.corrcoef(score.argsort().argsort(), aligned.argsort().argsort())[0, 1] > 0.99
    assert 0 <= score.min() <= score.max() <= 1
