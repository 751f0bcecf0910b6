"""Shards as other scripts write them, through a run, its check and an export: dots in keys, several captions, any order."""

import random

import pyarrow.parquet as pq
import pytest

from jobs.cli import app
from pipeline.run import run
from tests.support.tars import read_tar, write_tar


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory):
    """A corpus of 18 images a shard, whose keys have dots and whose images have two captions, shuffled; a target of five."""
    folder = tmp_path_factory.mktemp("layouts")
    for shard in range(2):
        members = []
        for i, (key, of_pair) in enumerate(pairs(corpus / "corpus" / f"{shard:05d}.tar")[:18]):
            text = of_pair["txt"] + f"\n\nsecond caption of {key}\n".encode()
            members += [(f"scan.{i:03d}.webp", of_pair["webp"]), (f"scan.{i:03d}.txt", text)]
        write_tar(folder / "corpus" / f"{shard:05d}.tar", random.Random(shard).sample(members, len(members)))
    five = [
        (f"{key}.{suffix}", b"\n".join(b"%s, said %d" % (data, n) for n in range(5)) if suffix == "txt" else data)
        for key, of_pair in pairs(corpus / "target" / "00000.tar")[:8]
        for suffix, data in of_pair.items()
    ]
    write_tar(folder / "target" / "00000.tar", five)
    return folder


def pairs(tar) -> list[tuple[str, dict[str, bytes]]]:
    found: dict[str, dict[str, bytes]] = {}
    for name, data in read_tar(tar):
        key, _, suffix = name.partition(".")
        found.setdefault(key, {})[suffix] = data
    return list(found.items())


def typed(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_a_caption_is_a_pair_from_the_shard_to_the_export(shards, configure, local_ray, tmp_path, capsys):
    caption = {"field": "txt", "pick": "all"}
    corpus = {"shards": str(shards / "corpus"), "key": "last_dot", "caption": caption}
    targets = {"clean": {"shards": str(shards / "target"), "caption": caption}}
    outcome = run(configure(tmp_path / "run", corpus=corpus, targets=targets))
    assert (outcome.pairs, outcome.scored, outcome.quarantined) == (72, 72, {})
    said = capsys.readouterr().err
    assert "00000.tar: " in said
    assert "members are not next to others of their key" in said
    keys = outcome.scores(["shard", "key", "uid"]).to_pylist()
    assert {(r["shard"], r["key"]) for r in keys} == {
        (f"{shard:05d}", f"scan.{i:03d}{number}") for shard in range(2) for i in range(18) for number in ("", ".1")
    }
    assert len({r["uid"] for r in keys}) == 36
    typed("verify", tmp_path / "run")
    assert " 40 " in capsys.readouterr().out  # pairs of the target

    typed("select", tmp_path / "run", "--by", "held_out_loss", "--keep", 0.5, "--out", tmp_path / "kept", "--format", "keys")
    typed("export", tmp_path / "run", "--subset", tmp_path / "kept", "--out", tmp_path / "out")
    exported = {name: data for tar in sorted((tmp_path / "out").glob("*.tar")) for name, data in read_tar(tar)}
    rows = [row for table in sorted((tmp_path / "out").glob("*.parquet")) for row in pq.read_table(table).to_pylist()]
    source = {shard: dict(read_tar(shards / "corpus" / f"{shard}.tar")) for shard in ("00000", "00001")}
    assert len(rows) == 36
    assert len(exported) == 72
    for row in rows:
        image = row["corpus_key"][: len("scan.000")]
        lines = [line for line in source[row["shard"]][f"{image}.txt"].decode().split("\n") if line]
        assert exported[f"{row['key']}.webp"] == source[row["shard"]][f"{image}.webp"]
        assert exported[f"{row['key']}.txt"].decode() == lines[row["corpus_key"].endswith(".1")]
