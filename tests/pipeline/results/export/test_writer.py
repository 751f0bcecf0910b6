"""A format of one's own is one class, found by its name or its path."""

import json

import pytest

from pipeline import storage
from pipeline.errors import RunError, UserError
from pipeline.results.export import KeptPair, Writer, export
from tests.support.exports import COPIES, SELECTED, caption, write_selected


class JsonLines(Writer, name="jsonl"):
    """The uid and the caption of each pair."""

    suffix = ".jsonl"

    def __init__(self, url: str, scratch: str):
        super().__init__(url, scratch)
        self.lines: list[str] = []

    def add(self, pair: KeptPair) -> None:
        self.lines.append(json.dumps({"uid": pair.uid, "key": pair.key, "caption": pair.members["txt"].data.decode()}))

    def close(self) -> int:
        storage.write_bytes(self.url, "\n".join(self.lines).encode())
        return len(self.lines)


class Forgetful(JsonLines):
    """Loses a pair of each shard."""

    def close(self) -> int:
        self.lines.pop()
        return super().close()


@pytest.mark.parametrize("name", ["jsonl", f"{__name__}:JsonLines"])
def test_every_selected_pair_reaches_the_writer_once_for_each_copy(run, tmp_path, name):
    done = export(run.folder, write_selected(run, tmp_path, SELECTED), str(tmp_path / "out"), writer=name)
    assert (done.shards, done.pairs, done.usage) == (2, SELECTED.total(), "")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(files) == [tmp_path / "out" / f"{shard}.jsonl" for shard in sorted(COPIES)]
    for shard, copies in COPIES.items():
        lines = [json.loads(line) for line in (tmp_path / "out" / f"{shard}.jsonl").read_text().splitlines()]
        assert lines == [
            {"uid": run.uids[shard, key], "key": written, "caption": caption(shard, key)} for key, written in copies
        ]


def test_a_writer_that_loses_a_pair_fails_the_export(run, tmp_path):
    with pytest.raises(RunError, match=r"pairs written; has it changed"):
        export(run.folder, write_selected(run, tmp_path, SELECTED), str(tmp_path / "out"), f"{__name__}:Forgetful")


@pytest.mark.parametrize("name", ["parquet", "nowhere:Writer", "pipeline.results.export:export"])
def test_a_writer_that_is_not_there_is_said_before_anything_starts(run, tmp_path, name):
    with pytest.raises(UserError, match=name):
        export(run.folder, write_selected(run, tmp_path, SELECTED), str(tmp_path / "out"), name)
    assert not (tmp_path / "out").exists()
