"""Nights: a corpus that grows, changes and shrinks, one generation after the other."""

import shutil
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.errors import UserError
from pipeline.operate.history import history, rollback
from pipeline.operate.prune import prune
from pipeline.operate.retry import retry
from pipeline.operate.status import status
from pipeline.operate.verify import verify
from pipeline.results.export import export
from pipeline.run import run
from pipeline.run_folder.finished import open_generation, open_run
from pipeline.run_folder.generations import Generations
from pipeline.run_folder.reference import reference_from, write_pending
from pipeline.run_folder.tables import parquet_bytes
from pipeline.storage.lease import hold_folder
from pipeline.workers import deadline
from tests.support.nights import PAIRS, more
from tests.support.run_folders import change_since, objects, state_of
from tests.support.tars import read_tar, write_tar


def test_a_night_computes_what_is_new_and_nothing_else(second):
    tonight, before, columns = second, state_of(second.folder), second.table()
    more(tonight.corpus, "00003", 0)
    more(tonight.corpus, "00001", 1)  # in the place of another one
    (tonight.corpus / "00002.tar").unlink()
    (tonight.corpus / "00004.tar").write_bytes(b"no tar at all")
    done = tonight.night()
    assert (done.state, done.generation.number) == ("done", 1)
    facts = done.generation.record["night"]
    assert (facts["new"], facts["changed"], facts["gone"], facts["left"]) == (2, 1, 1, 0)
    assert (facts["scored"], facts["pairs"], facts["shards"]) == (2 * PAIRS, 3 * PAIRS, 3)
    assert facts["bytes"] == sum((tonight.corpus / f"{shard}.tar").stat().st_size for shard in ("00001", "00003", "00004"))
    new = change_since(before, tonight.folder).new
    assert {kind: n for kind, n in new.items() if not kind.startswith("table")} == {
        "features": 4 + 1, "shards": 2, "pairs": 2, "influence/clean": 2, "quarantine": 1
    }  # fmt: skip
    now = tonight.table()
    assert now.keys() == {"00000", "00001", "00003"}
    assert now["00000"] == columns["00000"]
    assert now["00001"] != columns["00001"]
    assert tonight.table(0) == columns
    again = tonight.night()
    assert (again.state, again.committed, again.generation.number) == ("nothing new", 0, 1)
    assert [(s.name, s.done, s.total) for s in status(str(tonight.folder))][-2:] == [("score", 3, 3), ("generation 1", 3, 3)]
    wrong = []
    assert verify(str(tonight.folder), wrong.append)["corpus"].scored == 3 * PAIRS
    assert wrong == []
    more(tonight.corpus, "00005", 0)
    assert [(s.name, s.done, s.total) for s in status(str(tonight.folder))][-1] == ("generation 1", 3, 4)
    assert verify(str(tonight.folder), wrong.append)["corpus"].scored == 3 * PAIRS
    (tonight.corpus / "00001.tar").unlink()  # its columns stay in the generation until the next night
    verify(str(tonight.folder), wrong.append)
    assert wrong == []
    gone = Path(Generations(str(tonight.folder)).url(done.generation.files["00001"]))
    kept = gone.read_bytes()
    gone.unlink()
    verify(str(tonight.folder), wrong.append)
    assert [(Path(violation.url), violation.wrong) for violation in wrong] == [(gone, "is not there as it was committed")]
    gone.write_bytes(kept)
    wrong.clear()
    file = done.generation.files["00003"]
    Path(Generations(str(tonight.folder)).url(file)).write_bytes(b"no table")
    verify(str(tonight.folder), wrong.append)
    assert [violation.url.rpartition("/")[2] for violation in wrong] == [file.path.rpartition("/")[2]]


def test_a_night_without_usable_pairs_says_so(second, capsys):
    members = [(name, b"no image" if name.endswith(".webp") else data) for name, data in read_tar(second.corpus / "00000.tar")]
    write_tar(second.corpus / "00003.tar", members[: 3 * 5])
    before = second.table()
    done = second.night(prices={"core_hour": 3600.0})  # 5 of the corpus's 113 pairs are within embed.max_bad_fraction
    assert (done.state, done.generation.number) == ("drift", 1)
    facts = done.generation.record["night"]
    assert (facts["new"], facts["scored"], facts["quarantined"]) == (1, 0, {"undecodable_image": 5})
    assert (facts["drift"]["misaligned"], facts["drift"]["lds"]) == (None, {})
    assert {name: value for name, (value, _) in facts["drift"]["measures"].items()} == {"quarantined": 1.0}
    assert facts["price"] == pytest.approx(3600 * facts["worker_hours"], rel=0.1)
    said = capsys.readouterr().err
    assert "1 shards new, 0 changed, 0 gone, 0 left; 0 pairs scored; 5 quarantined (5 undecodable_image)" in said
    assert f"{facts['worker_hours']:.3g} core hours at {facts['price']:.3g}; " in said
    assert second.table() == before
    assert history(str(second.folder))[0][8:11] == ["5", "", "quarantined 1 is beyond quarantined: 0.1"]
    assert second.night().state == "nothing new"


def test_a_night_carries_columns_of_sidecars(nights):
    def beside(shard: str, of: list, **more) -> None:
        members = read_tar(nights.corpus / f"{shard}.tar")
        keys = sorted({name.split(".")[0] for name, _ in members}, reverse=True)
        (nights.corpus / f"{shard}.parquet").write_bytes(parquet_bytes(pa.table({"key": keys, "similarity": of, **more})))

    def carried(number: int) -> dict[str, list]:
        frame = DeltaTable(nights.folder / "table", version=number).to_pandas().sort_values("key", ascending=False)
        return {shard: rows.tolist() for shard, rows in frame.groupby("shard")["sidecar_similarity"]}

    asked, values = {"corpus": {"sidecar": ["similarity"]}}, [i / PAIRS for i in range(PAIRS)]
    for shard in ("00000", "00001", "00002"):
        beside(shard, values)
    nights.night(**asked)
    assert carried(0) == dict.fromkeys(("00000", "00001", "00002"), values)
    more(nights.corpus, "00003", 0)
    beside("00003", values[::-1])
    beside("00001", values[::-1])
    before = nights.table()
    done = nights.night(**asked)
    facts = done.generation.record["night"]
    assert (facts["new"], facts["changed"], facts["scored"]) == (1, 1, 2 * PAIRS)
    assert carried(1) == {"00000": values, "00001": values[::-1], "00002": values, "00003": values[::-1]}
    assert {shard for shard, data in nights.table().items() if before.get(shard) != data} == {"00001", "00003"}
    for shard in ("00000", "00001", "00002", "00003"):  # of another type: no column of this generation is one of the next
        beside(shard, [str(value) for value in values])
    done = nights.night(**asked)
    assert len(done.generation.files) == 4
    assert carried(done.generation.number) == {shard: [str(value) for value in values] for shard in done.generation.files}
    assert carried(1)["00001"] == values[::-1]


def test_every_reader_finds_the_pairs_of_a_generation_as_one_table(second):
    more(second.corpus, "00003", 0)
    second.night()
    root = second.folder / "table"
    scores = open_run(str(second.folder)).scores().to_pandas()
    for number, pairs in ((0, 3 * PAIRS), (1, 4 * PAIRS)):
        dataset = DeltaTable(root, version=number).to_pyarrow_dataset()  # noqa: F841  (DuckDB finds it by its name)
        assert duckdb.sql("select count(*), count(distinct uid) from dataset").fetchall() == [(pairs, pairs)]
        frame = DeltaTable(root, version=number).to_pandas().sort_values(["shard", "index"])
        assert len(frame) == pairs
        assert polars.read_delta(str(root), version=number)["uid"].n_unique() == pairs
        wanted = scores[scores["shard"] < f"{number + 3:05d}"].sort_values(["shard", "index"])
        assert frame["influence_clean"].tolist() == wanted["influence_clean"].tolist()


def test_a_run_from_nothing_with_the_same_reference_gives_the_same_bytes(second, tmp_path):
    more(second.corpus, "00003", 0)
    (second.corpus / "00001.tar").unlink()
    done = second.night()
    elsewhere = tmp_path / "elsewhere"
    for kind in ("copies", "fit_choice", "heads", "evidence", "directions", "misalignment", "filter", "targets"):
        shutil.copytree(second.folder / kind, elsewhere / kind)
    write_pending(str(elsewhere), reference_from(done.generation.record["reference"]))
    again = second.night(elsewhere)
    assert again.generation.number == 0
    assert objects(elsewhere / "table", ".parquet") == {
        name: data
        for name, data in objects(second.folder / "table", ".parquet").items()
        if "/00001." not in name  # of the first night
    }
    assert not list(elsewhere.glob("heads/*/**")) or objects(elsewhere / "heads", "") == objects(second.folder / "heads", "")


def test_a_subset_of_a_generation_can_be_repeated_and_an_increment_selected(second, tmp_path):
    def chosen(*options: str) -> bytes:
        out = tmp_path / "subset.npy"
        asked = ["select", str(second.folder), "--by", "misalignment", "--keep", "0.5", "--out", str(out), *options]
        assert CliRunner().invoke(app, asked).exit_code == 0
        return out.read_bytes()

    before = chosen()
    more(second.corpus, "00003", 0)
    second.night()
    assert chosen("--generation", "0") == before != chosen()
    increment = open_generation(str(second.folder), since=0)
    assert increment.scores(["shard"])["shard"].unique().to_pylist() == ["00003"]
    rows = np.load(tmp_path / "subset.npy") if chosen("--since", "0") else None
    new = {(int(u[:16], 16), int(u[16:], 16)) for u in increment.scores(["uid"])["uid"].to_pylist()}
    assert len(rows) == PAIRS // 2
    assert {tuple(map(int, row)) for row in rows} < new
    chosen()
    assert export(str(second.folder), str(tmp_path / "subset.npy"), str(tmp_path / "new"), since=0).shards == 1
    assert export(str(second.folder), str(tmp_path / "subset.npy"), str(tmp_path / "all")).shards == 4
    with pytest.raises(UserError, match="has no shard that generation 1 does not have"):
        open_generation(str(second.folder), since=1)
    with pytest.raises(UserError, match="no generation 7; there are 0 to 1"):
        open_generation(str(second.folder), generation=7)


def test_a_deadline_leaves_whole_shards_for_the_next_night(nights, monkeypatch):
    hurried = {"nightly": {"deadline_hours": 1e-9}}
    first = nights.night(**hurried)
    assert (first.state, first.generation) == ("deadline", None)
    assert nights.night().generation.number == 0
    for number in range(2):
        more(nights.corpus, f"0001{number}", number)
    before = nights.table()
    late = nights.night(**hurried)
    assert (late.state, late.committed) == ("deadline", 0)
    monkeypatch.setattr(deadline, "passed", lambda: any(nights.folder.glob("shards/*/00010.json")))
    late = nights.night()
    monkeypatch.undo()
    assert late.state in ("deadline", "done"), "the other shard may have been done by then, too"
    facts = late.generation.record["night"]
    assert facts["new"] >= 1 and facts["new"] + facts["left"] == 2
    assert nights.table().items() >= before.items()
    assert nights.night().generation.record["night"]["pairs"] == 5 * PAIRS


def test_a_way_back_and_the_next_night(second):
    first = second.table()
    more(second.corpus, "00003", 0)
    second.night()
    third = second.table()
    state = state_of(second.folder)
    assert rollback(str(second.folder), 0) == 2
    assert second.table() == first
    new, rewritten, gone = change_since(state, second.folder)
    assert ({*new} - {"table"}, rewritten, gone) == (set(), set(), set())
    state = state_of(second.folder)
    assert second.night().generation.number == 3
    assert second.table() == third
    new, rewritten, gone = change_since(state, second.folder)
    assert ({*new} - {"table"}, rewritten, gone) == (set(), set(), set())  # nothing was computed twice
    assert [row[-1] for row in history(str(second.folder))] == ["", "generation 0 again", "", "the first"]
    with pytest.raises(UserError, match="generation 3 is the last one"):
        rollback(str(second.folder), 3)


def test_pruning_deletes_what_no_kept_generation_is_made_of(second):
    more(second.corpus, "00003", 0)
    (second.corpus / "00001.tar").unlink()
    second.night()
    second.night(seed=1)
    kept = {number: second.table(number) for number in (1, 2)}
    before = state_of(second.folder)
    told = prune(str(second.folder), keep=2, dry_run=True)
    assert state_of(second.folder) == before
    done = prune(str(second.folder), keep=2, dry_run=False)
    assert (done.objects, done.kept) == (told.objects, [2, 1])
    assert {number: second.table(number) for number in (1, 2)} == kept
    gone = {item.url.removeprefix(f"{second.folder}/") for item in done.objects}
    assert {name.split("/")[0] for name in gone} == {"table", "features", "shards", "pairs", "influence"}
    assert all("00001" in name for name in gone)
    for look in (rollback, open_generation):
        with pytest.raises(UserError, match="generation 0 was pruned: 1 of its 3 files are gone"):
            look(str(second.folder), 0)
    prune(str(second.folder), keep=1, dry_run=False)
    assert second.table(2) == kept[2]
    assert len(list((second.folder / "heads").iterdir())) == 1
    assert prune(str(second.folder), keep=1, dry_run=False).objects == []
    assert second.night(seed=1).state == "nothing new"


@pytest.mark.slow
def test_pruning_cleans_a_folder_that_never_was_nightly(finished, configure, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0].run, folder)
    (folder / "notes.txt").write_text("mine")
    outcome = run(configure(folder, seed=1))
    prune(str(folder), keep=1, dry_run=False)
    names = {"/".join(name.split("/")[:2]) for name in state_of(folder)}
    assert all(sum(name.startswith(f"{kind}/") for name in names) == 1 for kind in ("heads", "pairs", "evidence", "features"))
    assert (folder / "notes.txt").exists()
    before = state_of(folder)
    assert run(configure(folder, seed=1)).finished == outcome.finished
    assert change_since(before, folder) == (Counter(), set(), set())


def test_what_a_night_refuses(second, configure, tmp_path):
    with pytest.raises(UserError, match="has generations: `ecif nightly` adds to them"):
        run(second.config())
    with pytest.raises(UserError, match="index: nights do not know it"):
        second.night(index={})
    with hold_folder(str(second.folder)), pytest.raises(UserError, match="another run is at work"):
        second.night()
    with pytest.raises(UserError, match="`ecif retry` is for runs"):
        retry(str(second.folder))
    with pytest.raises(UserError, match="no generations there"):
        history(str(tmp_path))
    for mistake in (lambda: rollback(str(tmp_path), 0), lambda: prune(str(tmp_path), 1, dry_run=False)):
        with pytest.raises(UserError, match=r"no generations there|no run there"):
            mistake()
        assert not (tmp_path / "lease").exists()
