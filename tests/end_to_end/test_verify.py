"""Every kind of damage to a finished run is found and named; a run that is whole is said to be."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.operate import verify as verifying
from pipeline.operate.verify import TABLES, Violation, verify
from pipeline.run import run
from pipeline.run_folder.artifacts import KINDS
from pipeline.run_folder.finished import open_run
from pipeline.run_folder.tables import parquet_bytes
from tests.support.labelled import write_labelled
from tests.support.run_folders import kind_of, state_of, violations
from tests.support.tars import read_tar


def the(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def rewrite(path: Path, change) -> None:
    path.write_bytes(parquet_bytes(change(pq.read_table(path))))


def test_a_whole_run(imperfect, damaged):
    found: list[Violation] = []
    checked = verify(str(damaged), found.append)
    assert found == []
    outcome = imperfect.outcome
    corpus = checked["corpus"]
    assert (corpus.shards, corpus.pairs, corpus.scored) == (3, outcome.pairs, outcome.scored)
    assert corpus.embedded == outcome.scored
    assert corpus.quarantined == Counter(outcome.quarantined)
    assert set(outcome.quarantined) == {"undecodable_image", "missing_caption", "truncated_shard"}
    assert corpus.parts == len(list((damaged / "features").rglob("*.parquet")))
    assert (checked["target clean"].pairs, checked["target clean"].scored) == (24, 0)


@pytest.mark.parametrize(("key", "value", "found"), [("prices", {"core_hour": 0.1}, 0), ("workers", 7, 0), ("seed", 1, 1)])
def test_another_configuration_was_started_if_a_key_counts(damaged, key, value, found):
    facts = json.loads((damaged / "started.json").read_text())
    facts["config"][key] = value
    (damaged / "started.json").write_text(json.dumps(facts))
    said: list[Violation] = []
    verify(str(damaged), said.append)
    assert sum("another configuration" in violation.wrong for violation in said) == found == len(said)


@pytest.mark.parametrize("kind", ["pairs", "influence"])
def test_every_column_of_a_table_is_looked_for(imperfect, damaged, kind):
    (path, *_) = sorted(damaged.glob(f"{kind}/**/*.parquet"))
    looked_for = TABLES[kind](open_run(str(imperfect.run)).config)
    assert set(pq.read_schema(path).names) == {"index", *looked_for}


def test_objects_that_are_missing(damaged):
    names = ["features/*/00000/00001.parquet", "shards/*/00001.json", "quarantine/*/00002.parquet", "latest/00000.parquet"]
    names += ["influence/clean/*/00000.*.parquet", "directions/clean/*.safetensors"]
    names += ["targets/clean/features/*/00000/00002.parquet"]
    for name in names:
        the(damaged, name).unlink()
    found = violations(damaged)
    assert {wrong for _, wrong in found} == {"is missing"}
    # Columns are held against features: where those are missing, they can't be.
    named = [name.replace("/*/", "/").replace("/*.", ".") for name in names if not name.startswith(("latest/", "influence/"))]
    assert sorted(object for object, _ in found) == sorted(named)


def expect_each_to_be_missed(config: Config, folder: Path) -> None:
    """Every object that `verify` has to know is taken away, one at a time, and is the only one that it names."""
    assert violations(folder) == []
    names = sorted(state_of(folder))
    kinds = {"latest" if kind == "scores" else kind for kind, what in KINDS.items() if what.asked(config)}
    assert kinds <= {part for name in names for part in kind_of(name).split("/")}
    for name in names:
        path, aside = folder / name, folder.parent / "aside"
        path.rename(aside)
        found: list[Violation] = []
        verify(str(folder), found.append)
        assert [(v.url.removeprefix(f"{folder}/"), v.wrong) for v in found] == [(name, "is missing")]
        aside.rename(path)


def test_any_object_of_a_run_with_everything_is_missed(everything, tmp_path):
    folder = Path(shutil.copytree(everything[0].run, tmp_path / "run"))
    expect_each_to_be_missed(everything[0], folder)


def test_any_object_of_a_run_with_prompts_is_missed(configure, corpus, local_ray, tmp_path):
    target = write_labelled(tmp_path, read_tar(corpus / "target" / "00000.tar"))
    small = {"fit": {"folds": 2, "epochs": 1, "checkpoints": 1}, "solve": {"iterations": 3, "dampings": [0.1]}, "filter": None}
    config = configure(tmp_path / "run", targets={"classes": target}, **small)
    run(config)
    expect_each_to_be_missed(config, tmp_path / "run")


def test_a_missing_score_shard(damaged):
    the(damaged, "latest/00002.parquet").unlink()
    assert violations(damaged) == [("latest/00002.parquet", "is missing")]


OF_EVERY_FORMAT = ["features/*/00000/00001.parquet", "latest/00001.parquet", "pairs/*/00001.*.parquet", "heads/*.safetensors"]


@pytest.mark.parametrize("name", OF_EVERY_FORMAT)
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_objects_that_are_cut(damaged, name, kept):
    data = the(damaged, name).read_bytes()
    the(damaged, name).write_bytes(data[: int(kept * len(data))])
    found = violations(damaged)
    assert len(found) == 1
    assert "can't be read" in found[0][1]


def test_a_byte_that_has_changed_in_the_features(damaged):
    """Anywhere in the part: what is not noticed (a statistic, who wrote it) has not changed what is read."""
    path = the(damaged, "features/*/00000/00001.parquet")
    data, truth = path.read_bytes(), pq.read_table(path)
    noticed = 0
    for at in range(0, len(data), len(data) // 50):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        if violations(damaged):
            noticed += 1
        else:
            assert pq.read_table(path).equals(truth)
    assert noticed > 30


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda t: t.slice(1), "has 35 pairs, the accounting says 36 embedded"),
        (lambda t: pa.concat_tables([t, t.slice(0, 1)]), "has 37 pairs, the accounting says 36 embedded"),
        (lambda t: pa.concat_tables([t.slice(1), t.slice(0, 1)]), "in another order: index, key, uid, image_hash"),
        (
            lambda t: t.set_column(4, "image_features", pa.FixedSizeListArray.from_arrays(
                pc.multiply(t["image_features"].combine_chunks().flatten().cast("float32"), 1.5).cast("float16"),
                t["image_features"].type.list_size,
            )),
            "10 of 10 image_features are not of norm 1",
        ),
        (lambda t: _put(t, "image_hash", 3, "none"), "1 of 10 image_hash are not 32 hex digits"),
        (lambda t: _put(t, "image_hash", 3, t["image_hash"][4].as_py()), "in another order: image_hash"),
    ],
)  # fmt: skip
def test_features_of_other_pairs(damaged, change, wrong):
    rewrite(the(damaged, "features/*/00000/00001.parquet"), change)
    assert any(wrong in said for _, said in violations(damaged))


def test_a_part_too_many(damaged):
    path = the(damaged, "features/*/00000/00001.parquet")
    shutil.copy(path, path.with_name("00004.parquet"))
    assert violations(damaged) == [("features/00000/00004.parquet", "is no part by the accounting")]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"members": 100}, "100 members, but 108 in pairs and 0 ignored"),
        ({"embedded": 35}, "36 pairs, but 35 embedded and none quarantined"),
        ({"embedded": 35, "quarantined": {"bad_json": 1}}, "has 36 pairs, the accounting says 35 embedded"),
        ({"pairs": 37, "quarantined": {"bad_json": 1}}, "its 37 pairs are not each embedded or quarantined exactly once"),
        ({"parts": 3}, "is no part by the accounting"),
        ({"etag": "x"}, "as it is now"),
        ({"shard": "00001"}, "as it is now"),
        ({"pairs": "36"}, "can't be read: ValueError"),
        ({"more": 1}, "can't be read: TypeError"),
    ],
)
def test_edited_accounting(damaged, change, wrong):
    path = the(damaged, "shards/*/00000.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if "quarantined" in change and "pairs" in change:
        (damaged / "quarantine" / path.parent.name / "00000.parquet").write_bytes(
            parquet_bytes(_one_row(pq.read_table(the(damaged, "quarantine/*/00001.parquet"))))
        )
    assert any(wrong in said for _, said in violations(damaged))


def _one_row(table: pa.Table) -> pa.Table:
    row = table.slice(0, 1).to_pylist()[0] | {"shard": "00000", "index": 0, "reason": "bad_json"}
    return pa.Table.from_pylist([row], table.schema)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda t: t.slice(1), "the accounting says 1 missing_caption, 1 undecodable_image"),
        (lambda t: t.set_column(0, "shard", pa.array(["00000"] * len(t))), "has rows of another shard"),
        (lambda t: t.set_column(5, "reason", pa.array(["ugly"] * len(t))), "has reasons that there are not: ugly"),
        (lambda t: t.drop_columns("detail"), "of other names or types"),
    ],
)
def test_a_quarantine_table_that_does_not_agree(damaged, change, wrong):
    rewrite(the(damaged, "quarantine/*/00001.parquet"), change)
    assert any(wrong in said for _, said in violations(damaged))


def _put(table: pa.Table, name: str, row: int, value) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    return table.set_column(
        table.column_names.index(name), table.schema.field(name), pa.array(values, table.schema.field(name).type)
    )


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda t: _put(t, "uid", 3, t["uid"][4].as_py()), "in another order: uid"),
        (lambda t: pa.concat_tables([t.slice(5), t.slice(0, 5)]), "in another order: index, key, uid, image_hash"),
        (lambda t: t.slice(1), "has 33 rows for 34 embedded pairs"),
        (lambda t: _put(t, "misalignment", 3, float("nan")), "has NaN or infinity in misalignment"),
        (lambda t: _put(t, "influence_clean", 0, None), "has NaN or infinity in influence_clean"),
        (lambda t: t.drop_columns("influence_negative_clean"), "has no column influence_negative_clean"),
        (lambda t: _put(t, "shard", 0, "00000"), "has rows of another shard"),
    ],
)  # fmt: skip
def test_scores_that_are_not_of_the_pairs(damaged, change, wrong):
    rewrite(the(damaged, "latest/00001.parquet"), change)
    ((object, said),) = violations(damaged)
    assert (object, wrong in said) == ("latest/00001.parquet", True), said


@pytest.mark.parametrize("fact", [b"ecif.run", b"ecif.shard"])
def test_scores_of_an_earlier_run_or_of_a_shard_as_it_was(damaged, fact):
    rewrite(the(damaged, "latest/00001.parquet"), lambda t: t.replace_schema_metadata(t.schema.metadata | {fact: b"earlier"}))
    wrong = "is of another run, or of the shard as it was; the same `ecif run` writes it anew"
    assert violations(damaged) == [("latest/00001.parquet", wrong)]


def test_workers_say_what_threads_of_this_process_say(damaged, monkeypatch):
    whole: list = []
    for name in ("features/*/00000/00001.parquet", "latest/00001.parquet", "pairs/*/00002.*.parquet"):
        the(damaged, name).unlink()
        found: list[list[Violation]] = [[], []]
        for few, of in zip((256, 0), found, strict=True):
            monkeypatch.setattr(verifying, "FEW", few)
            whole.append(verify(str(damaged), of.append))
        assert found[0] == found[1]
        assert whole[-1] == whole[-2]
    assert len(found[0]) == 3


def test_scores_of_no_shard(damaged):
    path = the(damaged, "latest/00001.parquet")
    shutil.copy(path, path.with_name("00009.parquet"))
    assert violations(damaged) == [("latest/00009.parquet", "is of no shard of the corpus")]


def test_heads_that_are_not_finite(damaged):
    import torch
    from safetensors.torch import load_file, save_file

    path = the(damaged, "heads/*.safetensors")
    tensors = load_file(path)
    tensors["folds.0.0.text"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"facts": "{}"})
    assert [said for _, said in violations(damaged)] == ["holds NaN or infinity: folds.0.0.text"]


def test_a_run_that_is_not_finished_is_not_judged(damaged):
    (damaged / "run.json").unlink()
    with pytest.raises(UserError, match="not finished; `ecif status"):
        verify(str(damaged), print)
    with pytest.raises(UserError, match="no run there"):
        verify(str(damaged / "features"), print)
