"""How far a run is, and what of it can be tried again."""

import json
import os
import sys
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.config import Config
from pipeline.errors import RunError, UserError
from pipeline.operate.retry import retry
from pipeline.operate.status import duration, status
from pipeline.operate.verify import verify
from pipeline.run import run
from pipeline.run_folder.finished import open_run
from pipeline.storage.lease import hold_folder


def stages(folder: Path) -> dict:
    return {stage.name: stage for stage in status(str(folder))}


def started(folder: Path) -> dict:
    return json.loads((folder / "started.json").read_text())


def test_a_finished_run_has_nothing_left(imperfect, damaged):
    found = stages(damaged)
    assert list(found) == ["embed", "fit", "solve", "filter", "score", "publish"]
    assert all(stage.done == stage.total and stage.left_s is None for stage in found.values())
    assert found["embed"].total == 4
    assert found["embed"].pairs == imperfect.outcome.pairs + 24
    assert found["embed"].quarantined == sum(imperfect.outcome.quarantined.values())
    for stage in ("score", "publish"):
        assert (found[stage].total, found[stage].pairs) == (3, imperfect.outcome.scored)


def test_every_stage_that_was_asked_for_has_a_line(everything):
    found = stages(Path(everything[0].run))
    of_heads = ["embed", "fit", "solve", "order 2", "filter", "score"]
    assert list(found) == [*of_heads, "forward fit", "forward solve", "forward score", "index", "publish"]
    assert all(stage.done == stage.total > 0 for stage in found.values())


def test_rate_and_time_left_are_those_of_what_was_written_since_the_start(imperfect, damaged, corpus):
    """What is left is dated: a shard and the target in 40 s, another shard before the start."""
    start, features = started(damaged)["started"], started(damaged)["checkpoints"][0]
    embedded = [damaged / "shards" / features["corpus"] / f"0000{i}.json" for i in range(3)]
    target = damaged / "targets" / "clean" / "shards" / features["target clean"] / "00000.json"
    for path, when in ((embedded[0], start - 100), (embedded[1], start + 10), (target, start + 40)):
        os.utime(path, (when, when))
    pairs = [json.loads(path.read_text())["pairs"] for path in (*embedded, target)]
    embedded[2].unlink()
    found = stages(damaged)["embed"]
    assert (found.done, found.total, found.pairs) == (3, 4, pairs[0] + pairs[1] + pairs[3])
    assert found.last == pytest.approx(start + 40)
    assert found.pairs_per_s == pytest.approx((pairs[1] + pairs[3]) / 40)
    sizes = [(imperfect.corpus / f"0000{i}.tar").stat().st_size for i in range(3)]
    of_target = (corpus / "target" / "00000.tar").stat().st_size
    assert found.left_s == pytest.approx(sizes[2] * 40 / (sizes[1] + of_target), rel=1e-3)


def test_the_rate_of_scores_counts_from_the_end_of_the_stage_before(damaged):
    start, features = started(damaged)["started"], started(damaged)["checkpoints"][0]
    whens = {
        "copies": 40,
        "heads": 50,
        "evidence": 60,
        "directions": 80,
        "misalignment": 90,
        "filter": 100,
        "pairs": 105,
        "influence": 109,
    }
    for kind, when in whens.items():
        for path in (path for path in (damaged / kind).rglob("*") if path.is_file()):
            if path.suffix == ".parquet" and not path.name.startswith("00000."):
                path.unlink()
            else:
                os.utime(path, (start + when, start + when))
    found = stages(damaged)["score"]
    accounting = [json.loads((damaged / "shards" / features["corpus"] / f"0000{i}.json").read_text()) for i in range(3)]
    pairs = [a["embedded"] for a in accounting]
    assert (found.done, found.total, found.pairs, found.pairs_per_s) == (1, 3, pairs[0], pytest.approx(pairs[0] / 9))
    assert found.left_s == pytest.approx((pairs[1] + pairs[2]) * 9 / pairs[0])


@pytest.fixture(scope="module")
def given_up(tmp_path_factory, configure, imperfect):
    """A run that ended in its first stage: there are no captions where they were looked for."""
    folder = tmp_path_factory.mktemp("given_up") / "run"
    with pytest.raises(RunError, match="missing_caption"):
        run(configure(folder, corpus={"shards": str(imperfect.corpus / "00001.tar"), "caption": "titel"}))
    return folder


def test_a_run_that_ended_early_can_be_understood(given_up):
    found = stages(given_up)
    assert (found["embed"].done, found["embed"].quarantined) == (2, 36)
    assert [(found[name].done, found[name].total) for name in ("fit", "solve", "filter")] == [(0, 3), (0, 3), (0, 1)]
    assert [found[name].done for name in ("score", "publish")] == [0, 0]


def test_a_permanent_reason_is_not_tried_again(given_up):
    before = {path: path.stat().st_mtime_ns for path in given_up.rglob("*")}
    assert retry(str(given_up)) is None
    assert {path: path.stat().st_mtime_ns for path in given_up.rglob("*")} == before


def test_a_retry_forgets_nothing_while_another_run_has_the_folder(damaged):
    accounting = {path: path.read_bytes() for path in damaged.glob("shards/*/*.json")}
    with hold_folder(str(damaged)), pytest.raises(UserError, match="another run is at work"):
        retry(str(damaged))
    assert {path: path.read_bytes() for path in damaged.glob("shards/*/*.json")} == accounting


def test_a_mended_shard_is_taken_up_though_no_listing_shows_it_and_no_other(imperfect, damaged, corpus):
    features = damaged / "features" / started(damaged)["checkpoints"][0]["corpus"]
    before = {path: path.stat().st_mtime_ns for path in features.rglob("*.parquet")}
    before_id = open_run(str(damaged)).id
    broken = imperfect.replace("00002", (corpus / "corpus" / "00002.tar").read_bytes())
    try:
        config = Config.model_validate(started(damaged)["config"] | {"run": str(damaged)})
        assert run(config).quarantined == imperfect.outcome.quarantined  # nothing has changed, as far as anyone can see
        outcome = retry(str(damaged))
        assert outcome is not None
        assert outcome.quarantined == {"missing_caption": 1, "undecodable_image": 1}
        assert (outcome.pairs, outcome.scored) == (108, 106)
        assert open_run(str(damaged)).id != before_id
        written = {path.parent.name for path in features.rglob("*.parquet") if path.stat().st_mtime_ns != before.get(path)}
        assert written == {"00002"}
        found = []
        verify(str(damaged), found.append)
        assert found == []
        assert retry(str(damaged)) is None
    finally:
        imperfect.replace("00002", broken)


def test_the_commands_say_it_with_their_exit_codes(damaged, given_up, monkeypatch, capsys, tmp_path):
    def ecif(*arguments: str) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["ecif", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out.splitlines(), captured.err.splitlines()

    code, out, _ = ecif("status", str(damaged))
    assert code == 0
    assert [line.split()[:4] for line in out[1:]] == [
        ["embed", "4", "of", "4"],
        ["fit", "3", "of", "3"],
        ["solve", "3", "of", "3"],
        ["filter", "1", "of", "1"],
        ["score", "3", "of", "3"],
        ["publish", "3", "of", "3"],
    ]
    code, out, err = ecif("verify", str(damaged))
    assert (code, err) == (0, [])
    assert [line.split()[0] for line in out[1:]] == ["corpus", "target"]
    monkeypatch.chdir(damaged.parent)
    assert ecif("verify", "run") == (0, out, [])

    path = damaged / "latest" / "00001.parquet"
    path.unlink()
    code, out, err = ecif("verify", str(damaged))
    assert (code, out, err) == (1, [f"{path}: is missing"], [f"ecif: {damaged}: 1 violations"])

    code, _, err = ecif("retry", str(given_up))
    assert code == 0
    assert err[0].startswith("nothing to retry")
    for command in ("status", "verify", "retry"):
        code, _, err = ecif(command, str(tmp_path))
        assert (code, err) == (2, [f"ecif: {tmp_path}: no run there (no started.json)"])


def test_a_duration_in_words():
    assert [duration(s) for s in (0, 59.6, 200, 18_120, 273_600)] == ["0 s", "1 min 0 s", "3 min 20 s", "5 h 2 min", "3 d 4 h"]
