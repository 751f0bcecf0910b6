"""Odd shards are named, the first few of each kind, and the others are counted."""

from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Reading
from pipeline.stages.embed.oddities import NAMED, Oddities

SHARDS = [Shard(str(i), storage.Object(f"s3://b/{i}.tar", 1, "etag")) for i in range(NAMED + 3)]
COUNTS = {"members": 2, "in_pairs": 2, "ignored": 0, "pairs": 1, "embedded": 1}


def done(name: str, remarks: dict[str, str] | None) -> Accounting:
    return Accounting(name, 1, "etag", "", **COUNTS, quarantined={}, parts=1, broken=None, remarks=remarks)


def test_the_first_are_named_and_the_others_counted(capsys):
    oddities = Oddities(Dataset("run", "id", SHARDS, Reading()))
    for shard in SHARDS:
        oddities.note(
            done(shard.name, {"dots": "members are swallowed"} | ({"stats": "no number"} if shard.name == "1" else {}))
        )
    oddities.note(done("ordinary", None))
    oddities.settle()
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == ["s3://b/0.tar: members are swallowed", "s3://b/1.tar: members are swallowed", "s3://b/1.tar: no number"]
    assert said[3:-1] == [f"s3://b/{i}.tar: members are swallowed" for i in range(2, NAMED)]
    assert said[-1].startswith("3 more shards are odd in that way (dots): ")
