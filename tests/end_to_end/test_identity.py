"""Which pair is which, where uids repeat or are made up and shards hold few pairs: through a run, a selection, an export."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.cli import app
from pipeline.errors import UserError
from pipeline.run import run
from tests.support.tars import read_tar, write_tar


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory):
    """Shards of 36, 35 and 1 pairs: two captions an image in the first, uids of other kinds in the second."""
    folder = tmp_path_factory.mktemp("identity")
    members = [read_tar(corpus / "corpus" / f"{i:05d}.tar") for i in range(3)]
    uids = [[json.loads(data)["uid"] for name, data in of if name.endswith(".json")] for of in members]
    given = [
        [{"uid": uids[0][i // 2]} for i in range(36)],
        [{}, {"uid": 7}, {"uid": uids[1][2].upper()}, {"uid": f"{uids[1][3][:8]}-{uids[1][3][8:]}"}],
    ]
    for of, fields in zip(members, given, strict=False):
        at = [i for i, (name, _) in enumerate(of) if name.endswith(".json")]
        for i, one in zip(at, fields, strict=False):
            of[i] = (of[i][0], json.dumps(one).encode())
    for i, count in enumerate((36, 35, 1)):
        write_tar(folder / f"{i:05d}.tar", members[i][: 3 * count])
    return folder


def typed(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_a_pair_is_its_shard_and_key(shards, configure, local_ray, tmp_path, capsys):
    outcome = run(configure(tmp_path / "run", corpus={"shards": str(shards)}))
    assert (outcome.pairs, outcome.scored, outcome.quarantined) == (72, 71, {"alone_in_shard": 1})
    assert outcome.finished.uids[:3] == (71, 1, 2)
    assert outcome.finished.uids.repeated == 36
    said = capsys.readouterr().err
    assert "pairs looked at share their uid with others" in said
    typed("verify", tmp_path / "run")

    choice = ("select", tmp_path / "run", "--by", "held_out_loss", "--keep", 0.5)
    with pytest.raises(UserError, match=r"uids belong to pairs that are kept and to pairs that are not, .*; --format keys can"):
        typed(*choice, "--out", tmp_path / "subset.npy")
    assert not (tmp_path / "subset.npy").exists()
    typed(*choice, "--out", tmp_path / "keys.parquet", "--format", "keys")
    said = capsys.readouterr().err
    assert "36 of 71 pairs share their uid with others" in said
    assert "2 of 71 pairs have a uid that is not 32 hex digits, such as '7' (00001, " in said
    assert "1 of 71 pairs have no uid" in said

    typed("export", tmp_path / "run", "--subset", tmp_path / "keys.parquet", "--out", tmp_path / "out")
    scores = outcome.scores(["shard", "key", "held_out_loss"])
    best = np.sort(scores["held_out_loss"].to_numpy())[:36]  # round(35.5), half to even
    wanted = {(r["shard"], r["key"]) for r in scores.to_pylist() if r["held_out_loss"] <= best[-1]}
    rows = [row for path in sorted((tmp_path / "out").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert {(row["shard"], row["corpus_key"]) for row in rows} == wanted
    exported = [member for path in sorted((tmp_path / "out").glob("*.tar")) for member in read_tar(path)]
    in_corpus = {(name, m[0]): m[1] for name in ("00000", "00001") for m in read_tar(shards / f"{name}.tar")}
    assert {name: data for name, data in exported if name.endswith(".txt")} == {
        f"{row['key']}.txt": in_corpus[row["shard"], f"{row['corpus_key']}.txt"] for row in rows
    }


def test_shards_of_one_pair_are_refused_before_anything_starts(corpus, configure, tmp_path, capsys):
    members = read_tar(corpus / "corpus" / "00000.tar")
    for i in range(12):
        write_tar(tmp_path / "shards" / f"{i:05d}.tar", members[3 * i : 3 * i + 3])
    config = configure(tmp_path / "run", corpus={"shards": str(tmp_path / "shards")})
    with pytest.raises(UserError, match=r"corpus\.shards: one pair a shard, such as 00000: "):
        run(config)
    assert not (tmp_path / "run").exists()
