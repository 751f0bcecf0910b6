"""A run folder that an older version wrote: its objects are left alone, and none is taken for today's.

older_run.json has the names and sizes of what commit e9120a3 wrote for the small corpus with an index, order 2 and forward
mode.
"""

import json
import sys
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.run import run
from tests.support.corpora import ON_REQUEST
from tests.support.run_folders import objects, violations

OLDER = json.loads(Path(__file__).with_name("older_run.json").read_text())


@pytest.fixture
def older(tmp_path) -> Path:
    """A folder with those objects, whose bytes are not what they were."""
    folder = tmp_path / "run"
    for name, size in OLDER.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}".ljust(size) if name.endswith(".json") else b"old".ljust(size))
    return folder


def test_a_run_in_it_leaves_every_object_alone_and_uses_none(older, everything, configure, capsys):
    before = objects(older, "")
    assert {name: len(data) for name, data in before.items()} == OLDER
    same = ON_REQUEST | {"score": {key: value for key, value in ON_REQUEST["score"].items() if key != "columns"}}
    capsys.readouterr()
    outcome = run(configure(older, **same))
    said = [line for line in capsys.readouterr().err.splitlines() if "older version" in line]
    assert said == [f"{older} also holds objects of an older version of ecif: they are left alone, and none is used"]
    after = objects(older, "")
    del before["run.json"]  # which is of the run that finished last
    assert {name: after.get(name) for name in before} == before
    anew, fresh = outcome.scores(), everything[1].scores()
    assert anew == fresh.select(anew.column_names)
    assert violations(older) == []


@pytest.mark.parametrize("command", ["status", "verify", "retry", "select"])
def test_a_command_about_it_is_one_line(older, monkeypatch, capsys, command, tmp_path):
    more = ["--out", str(tmp_path / "subset.npy")] if command == "select" else []
    monkeypatch.setattr(sys, "argv", ["ecif", command, str(older), *more])
    with pytest.raises(SystemExit) as done:
        main()
    said = capsys.readouterr()
    line = f"ecif: {older}: made by an older version of ecif; `ecif run` computes it anew beside what is there"
    assert (done.value.code, said.out, said.err.splitlines()) == (2, "", [line])
    assert {name: len(data) for name, data in objects(older, "").items()} == OLDER
