"""The promises of `ecif run`, kept on real pairs with a small model."""

import io
import json
import math
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ecif.columns.evidence import Evidence
from pipeline import storage
from pipeline.errors import RunError
from pipeline.run import run
from pipeline.run_folder import tensors
from pipeline.run_folder.columns import EVERY_RUN, IDENTITY
from pipeline.run_folder.finished import open_run
from pipeline.workers.cluster import Resources
from tests.support.corpora import ON_REQUEST
from tests.support.labelled import write_labelled
from tests.support.run_folders import COLUMNS, objects
from tests.support.tars import read_tar, write_tar


def test_every_pair_is_scored_and_joins_back(finished, corpus):
    config, outcome = finished
    table = open_run(config.run).scores()
    assert table.column_names == COLUMNS
    assert (outcome.pairs, outcome.scored, outcome.quarantined) == (108, 108, {})
    truth = set()
    for shard in range(3):
        members = read_tar(corpus / "corpus" / f"{shard:05d}.tar")
        jsons = [(name, json.loads(data)) for name, data in members if name.endswith(".json")]
        truth |= {(f"{shard:05d}", i, name[:-5], f["uid"]) for i, (name, f) in enumerate(jsons)}
    assert {tuple(row.values()) for row in table.select(["shard", "index", "key", "uid"]).to_pylist()} == truth
    for column in COLUMNS[len(IDENTITY) :]:
        assert np.isfinite(table[column].to_numpy()).all()
    parts = table["influence_positive_clean"].to_numpy() + table["influence_negative_clean"].to_numpy()
    assert np.allclose(parts, table["influence_clean"].to_numpy(), rtol=1e-5)
    assert 0 <= min(table["misalignment"].to_pylist()) <= max(table["misalignment"].to_pylist()) <= 1
    evidence = tensors.load(outcome.finished.checkpoints[0].artifacts(config.run).url("evidence"), Evidence)
    learned_from = evidence.real[EVERY_RUN.index("agreement")]  # of all pairs: the sample is the corpus
    assert np.allclose(np.sort(table["agreement"].to_numpy()), np.sort(learned_from.numpy()), atol=1e-4)


def test_the_same_run_with_another_number_of_workers_gives_the_same_bytes(finished, configure, tmp_path):
    config, _ = finished
    truth = objects(config.run, ".parquet", ".safetensors")
    assert len(truth) > 15
    run(configure(tmp_path, workers=2))
    assert objects(tmp_path, ".parquet", ".safetensors") == truth


def test_shards_that_an_actor_scores_at_once_give_the_same_bytes(everything, configure, tmp_path, monkeypatch):
    """As on a GPU, whose actors are called by several threads."""
    truth = objects(everything[0].run, ".parquet", ".safetensors")
    shutil.copytree(everything[0].run, tmp_path, dirs_exist_ok=True)
    of_shards = [name for name in truth if name.split("/")[0] in ("pairs", "influence", "correction", "column", "latest")]
    assert {name.split("/")[0] for name in of_shards} == {"pairs", "influence", "correction", "column", "latest"}
    for name in of_shards:
        (tmp_path / name).unlink()
    monkeypatch.setattr(Resources, "pool", lambda self, tasks, threads=1, real=Resources.pool: real(self, tasks, 8))
    run(configure(tmp_path, workers=1, **ON_REQUEST))
    assert objects(tmp_path, ".parquet", ".safetensors") == truth


def test_a_second_call_does_nothing_again(finished):
    config, outcome = finished
    times = {item.url: item.etag for item in storage.listing(config.run, "")}
    assert run(config).scored == outcome.scored
    after = {item.url: item.etag for item in storage.listing(config.run, "")}
    changed = {url.removeprefix(f"{config.run}/") for url in times.keys() | after.keys() if times.get(url) != after.get(url)}
    assert {name for name in changed if not name.startswith("lease/")} <= {"run.json", "started.json"}


def test_what_an_interruption_left_undone_is_done(finished, configure, tmp_path):
    config, _ = finished
    truth = objects(config.run, ".parquet", ".safetensors")
    shutil.copytree(config.run, tmp_path, dirs_exist_ok=True)
    lost = [name for name in truth if name.startswith(("pairs", "influence", "latest", "directions"))]
    lost += [name for name in objects(tmp_path, "") if re.match(r"(features|shards)/\w+/00001", name)]
    for name in lost:
        (tmp_path / name).unlink()
    run(configure(tmp_path))
    assert objects(tmp_path, ".parquet", ".safetensors") == truth


def test_a_changed_shard_is_redone_and_so_is_all_that_follows_from_it(finished, configure, corpus, tmp_path):
    config, first = finished
    shutil.copytree(config.run, tmp_path / "run")
    shutil.copytree(corpus / "corpus", tmp_path / "pairs")
    write_tar(tmp_path / "pairs" / "00001.tar", read_tar(corpus / "corpus" / "00001.tar")[:30])
    second = run(configure(tmp_path / "run", corpus={"shards": str(tmp_path / "pairs")}))
    assert (first.scored, second.scored) == (108, 82)
    assert first.finished.id != second.finished.id
    before, after = objects(config.run, ".parquet"), objects(tmp_path / "run", ".parquet")
    kept = [name for name in before if name.startswith("features") and "/00001/" not in name]
    assert kept and all(before[name] == after[name] for name in kept)


def test_bad_pairs_are_quarantined_with_their_reason_and_counted(configure, corpus, tmp_path):
    members = dict(read_tar(corpus / "corpus" / "00000.tar"))
    keys = sorted({name.split(".")[0] for name in members})
    members[f"{keys[0]}.webp"] = b"no image"
    members[f"{keys[1]}.txt"] = b"  "
    del members[f"{keys[2]}.txt"]
    members[f"{keys[3]}.json"] = b"{"
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    members[f"{keys[4]}.webp"] = bomb.getvalue()
    write_tar(tmp_path / "pairs" / "00000.tar", list(members.items()))
    (tmp_path / "pairs" / "00001.tar").write_bytes((corpus / "corpus" / "00001.tar").read_bytes()[:40_000])
    (tmp_path / "pairs" / "00002.tar").write_bytes(b"not a tar at all")
    config = configure(tmp_path / "run", corpus={"shards": str(tmp_path / "pairs")})
    outcome = run(config)
    assert outcome.quarantined.pop("truncated_shard") == 2
    assert outcome.quarantined == {
        "undecodable_image": 1, "empty_caption": 1, "missing_caption": 1, "bad_json": 1, "too_many_pixels": 1,
    }  # fmt: skip
    assert outcome.scored + 7 == outcome.pairs
    tables = [pq.read_table(io.BytesIO(data)) for data in objects(tmp_path / "run" / "quarantine", ".parquet").values()]
    rows = {(row["shard"], row["key"]): row["reason"] for table in tables for row in table.to_pylist()}
    assert rows["00000", keys[4]] == "too_many_pixels"
    assert rows["00002", ""] == "truncated_shard"
    assert not {(r["shard"], r["key"]) for r in outcome.scores().to_pylist()} & set(rows)

    # Mended, the same run scores them, and no table says otherwise.
    for shard in range(3):
        shutil.copyfile(corpus / "corpus" / f"{shard:05d}.tar", tmp_path / "pairs" / f"{shard:05d}.tar")
    assert run(config)[1:4] == (108, 108, {})
    left = [pq.read_table(io.BytesIO(data)) for data in objects(tmp_path / "run" / "quarantine", ".parquet").values()]
    assert sum(map(len, left)) == 0


@pytest.mark.slow
def test_several_targets_have_a_column_set_each(finished, configure, corpus, tmp_path):
    clean = {"shards": str(corpus / "target")}
    outcome = run(configure(tmp_path, targets={"other": {"shards": str(corpus / "corpus/00000.tar")}, "clean": clean}))
    table, alone = outcome.scores(), open_run(finished[0].run).scores()
    names = list(outcome.finished.checkpoints[0].targets)
    assert names == ["clean", "other"]
    for name in names:
        assert {f"influence{part}_{name}" for part in ("", "_positive", "_negative")} < set(table.column_names)
    assert table["influence_clean"] == alone["influence_clean"], "a question's answer depends on no other question"
    assert table["filter_clean"] == alone["filter_clean"]
    assert np.corrcoef(table["influence_other"].to_numpy(), alone["influence_clean"].to_numpy())[0, 1] < 0.9


def test_targets_of_every_kind_have_a_column_set_each(configure, corpus, tmp_path, capsys):
    settings = write_labelled(tmp_path, read_tar(corpus / "target" / "00000.tar"))
    labelled = read_tar(tmp_path / "labelled" / "00000.tar")
    at = [i for i, (name, _) in enumerate(labelled) if name.endswith(".cls")]
    labelled[at[0]] = (labelled[at[0]][0], b"24")
    labelled[at[1]] = (labelled[at[1]][0], b"sun")
    del labelled[at[2]]
    write_tar(tmp_path / "labelled" / "00000.tar", labelled)
    pairs = {"shards": str(corpus / "target")}
    targets = {
        "pairs": pairs,
        "margin": pairs | {"loss": "retrieval_margin", "margin": 0.1},
        "classes": settings | {"calibrated": True},
    }
    outcome = run(configure(tmp_path / "run", targets=targets))
    table, said = outcome.scores(), capsys.readouterr().err
    of_targets = outcome.finished.checkpoints[0].targets
    assert sorted(of_targets) == sorted(targets)
    for name, facts in of_targets.items():
        for part in ("", "_positive", "_negative"):
            assert np.isfinite(table[f"influence{part}_{name}"].to_numpy()).all()
        assert np.isfinite(facts["lds_of_dampings"]).all()
        assert 0 < facts["coverage"] <= 1
        assert (f"warning: target {name} covers {facts['coverage']:.0%}" in said) == (facts["coverage"] < 0.8)
    assert len({tuple(table[f"influence_{name}"].to_pylist()) for name in targets}) == 3
    done = [json.loads(data) for data in objects(tmp_path / "run/targets/classes/shards", ".json").values()]
    assert [(d["embedded"], d["quarantined"]) for d in done] == [(21, {"bad_label": 3})]

    # Another question about the same pairs has other columns; what does not depend on it is not done again.
    before = objects(tmp_path / "run", ".parquet", ".safetensors")
    targets["margin"] = targets["margin"] | {"margin": 0.3}
    again = run(configure(tmp_path / "run", targets=targets))
    assert again.finished.id != outcome.finished.id
    anew = again.scores()
    assert [name for name in targets if anew[f"influence_{name}"] != table[f"influence_{name}"]] == ["margin"]
    new = objects(tmp_path / "run", ".parquet", ".safetensors").keys() - before.keys()
    kinds = {"/".join(name.split("/")[:2]) for name in new if not name.startswith("misalignment/")}
    assert kinds == {"directions/margin", "filter/margin", "influence/margin"}


def test_a_target_without_pairs_fails_with_one_line(configure, corpus, tmp_path):
    write_tar(tmp_path / "lonely" / "00000.tar", read_tar(corpus / "target" / "00000.tar")[:3])
    with pytest.raises(RunError, match="target clean: fewer than 6 usable pairs"):
        run(configure(tmp_path / "run", targets={"clean": {"shards": str(tmp_path / "lonely")}}))


def test_s3_gives_the_same_bytes_as_local_files(finished, configure, corpus, s3):
    for name in ("corpus", "target"):
        for path in (corpus / name).glob("*.tar"):
            storage.write_bytes(f"s3://{s3}/pairs/{name}/{path.name}", path.read_bytes())
    outcome = run(
        configure(
            f"s3://{s3}/run",
            corpus={"shards": f"s3://{s3}/pairs/corpus/{{00000..00002}}.tar"},
            targets={"clean": {"shards": f"s3://{s3}/pairs/target"}},
        )
    )
    assert outcome.scored == 108
    assert objects(f"s3://{s3}/run", ".parquet", ".safetensors") == objects(finished[0].run, ".parquet", ".safetensors")


def test_the_damping_and_its_agreement_are_reported(finished):
    config, outcome = finished
    facts = outcome.finished.checkpoints[0].targets["clean"]
    assert facts["damping"] in config.solve.dampings
    assert facts["refits"] == 4
    assert facts["lds"] == max(facts["lds_of_dampings"])
    assert math.isfinite(facts["residual"])
