"""What a further run in a folder computes: what is new, and what follows from it, counted object by object."""

import shutil
from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pytest

from ecif.batching import choose_batches
from pipeline.corpus.batches import batches_of
from pipeline.run import run
from pipeline.run_folder.artifacts import KINDS
from pipeline.run_folder.finished import open_run
from tests.support.corpora import EMBEDDED
from tests.support.run_folders import change_since, state_of
from tests.support.tars import read_tar, write_tar

SAMPLE = 40  # of batches of 16 and of 20 pairs: two of them, and no third one fits
PARTS = 4  # of a shard's 36 pairs, 10 each
FROM_HEADS = {"heads": 1, "evidence": 1, "directions/clean": 1, "misalignment": 1, "filter/clean": 1}
OF_EVERY_RUN = {"copies": 1, "fit_choice": 1, **FROM_HEADS}  # no shard has one
OF_A_SHARD = {"pairs": 1, "influence/clean": 1}


def copied(finished_run: str, folder: Path) -> Path:
    """A run folder to go on in."""
    return Path(shutil.copytree(finished_run, folder / "run"))


def more_pairs() -> list[tuple[str, bytes]]:
    """36 pairs that the small corpus does not have."""
    return read_tar(EMBEDDED / "corpus" / "00001.tar")[: 3 * 36]


def rows_of(table, shard: str) -> list[str]:
    """Keys of a shard's pairs in a table of columns."""
    return table.filter(pc.equal(table["shard"], shard))["key"].to_pylist()


def keys_in(members: list[tuple[str, bytes]]) -> list[str]:
    return [name.removesuffix(".json") for name, _ in members if name.endswith(".json")]


def times(count: int, of_shard: dict[str, int]) -> dict[str, int]:
    return {kind: count * objects for kind, objects in of_shard.items()}


def test_the_same_configuration_again_writes_nothing(everything):
    config, outcome = everything
    before = state_of(config.run)
    again = run(config)
    assert change_since(before, config.run) == (Counter(), set(), set())
    assert (again.scored, again.finished) == (outcome.scored, outcome.finished)


def test_what_is_asked_for_in_addition_redoes_nothing(finished, everything):
    before = state_of(finished[0].run)
    new, rewritten, gone = change_since(before, everything[0].run)
    assert new == Counter(
        curvature=1, parameters=1, index_projection=1, index=3 + 3, index_curvature=1, self_influence=3,
        **{"second_order/clean": 1, "correction/clean": 3, "forward_directions/clean": 1, "forward_influence/clean": 3},
        **{"column/negclip_loss": 3, "column/normsim_2_clean": 3, "column/normsim_inf_clean": 3},
        **{"column/lemon": 3, "column/gsc": 3, "column/gradient_norm": 3},
    )  # fmt: skip
    assert (rewritten, gone) == ({f"latest/0000{i}.parquet" for i in range(3)}, set())


def test_a_second_folder_of_shards_renames_nothing_of_the_first(finished, configure, corpus, tmp_path):
    folder = copied(finished[0].run, tmp_path)
    write_tar(tmp_path / "more" / "00000.tar", more_pairs())
    before = state_of(folder)
    outcome = run(configure(folder, corpus={"shards": [str(corpus / "corpus"), str(tmp_path / "more")]}))
    new, rewritten, gone = change_since(before, folder)
    # The sample is the whole corpus here: heads and all that follows from them are of the new pairs too.
    of_shards = times(4, OF_A_SHARD)
    assert new == Counter(features=PARTS, shards=1, latest=1, **OF_EVERY_RUN, **of_shards)
    assert (rewritten, gone) == ({f"latest/0000{i}.parquet" for i in range(3)}, set())
    assert outcome.scored == 108 + 36
    assert rows_of(outcome.scores(), "more/00000") == keys_in(more_pairs())


def test_a_second_target_costs_its_own_objects(everything, configure, corpus, tmp_path):
    config, first = everything
    folder = copied(config.run, tmp_path)
    before = state_of(folder)
    asked = config.model_dump(mode="json") | {"run": str(folder)}
    asked["targets"] |= {"other": {"shards": str(corpus / "corpus" / "00000.tar")}}
    outcome = run(type(config).model_validate(asked))
    new, rewritten, gone = change_since(before, folder)
    of_target = {"directions": 1, "second_order": 1, "filter": 1, "influence": 3, "correction": 3}
    of_target |= {"forward_directions": 1, "forward_influence": 3}
    expected = {f"{kind}/other": count for kind, count in of_target.items()}
    expected |= {"column/normsim_2_other": 3, "column/normsim_inf_other": 3, "misalignment": 1}
    assert new == Counter({**expected, "targets/other/features": PARTS, "targets/other/shards": 1})
    assert (rewritten, gone) == ({f"latest/0000{i}.parquet" for i in range(3)}, set())
    # What is asked about the first target, and what is asked about none, is what it was.
    was, now = first.scores(), outcome.scores()
    changed = {name for name in was.column_names if not was[name].equals(now[name])}
    assert {"misalignment"} <= changed <= {"misalignment", "leverage"}  # leverage is the largest over targets


@pytest.fixture(scope="module")
def sampled(finished, configure, tmp_path_factory):
    """The finished run with heads of a sample of SAMPLE pairs: its configuration."""
    config = configure(
        copied(finished[0].run, tmp_path_factory.mktemp("sampled")), fit={"folds": 2, "epochs": 2, "sample": SAMPLE}
    )
    run(config)
    return config


def in_sample(config, shards: list[str]) -> set[str]:
    """Which of some shards with 36 pairs each the sample has batches of."""
    return set(choose_batches(dict.fromkeys(shards, 36), batches_of(config), SAMPLE))


def test_a_new_shard_that_leaves_the_sample_alone_costs_its_own_tables(sampled, configure, corpus, tmp_path):
    known = [f"0000{i}" for i in range(3)]
    name = next(name for name in (f"{i:05d}" for i in range(3, 100)) if name not in in_sample(sampled, [*known, name]))
    folder = copied(sampled.run, tmp_path)
    shutil.copytree(corpus / "corpus", tmp_path / "pairs")
    write_tar(tmp_path / "pairs" / f"{name}.tar", more_pairs())
    before = state_of(folder)
    # The other shards lie elsewhere now, but what they hold is the same.
    outcome = run(_elsewhere(sampled, folder, tmp_path / "pairs"))
    assert outcome.scored == 108 + 36
    new, rewritten, gone = change_since(before, folder)
    assert new == Counter(features=PARTS, shards=1, latest=1, **OF_A_SHARD)
    assert (rewritten, gone) == (set(), set())


def test_a_changed_shard_has_new_tables_beside_the_old_ones_and_new_rows_in_latest(sampled, corpus, tmp_path):
    free = _out_of_the_sample(sampled)
    folder = copied(sampled.run, tmp_path)
    shutil.copytree(corpus / "corpus", tmp_path / "pairs")
    write_tar(tmp_path / "pairs" / f"{free}.tar", more_pairs())
    before = state_of(folder)
    outcome = run(_elsewhere(sampled, folder, tmp_path / "pairs"))
    assert rows_of(outcome.scores(), free) == keys_in(more_pairs())
    new, rewritten, gone = change_since(before, folder)
    assert (new, gone) == (Counter(OF_A_SHARD), set())
    features = outcome.finished.checkpoints[0].features
    parts = {f"features/{features}/{free}/{i:05d}.parquet" for i in range(PARTS)}
    assert rewritten == {*parts, f"shards/{features}/{free}.json", f"latest/{free}.parquet"}

    # As it was before, it has its tables of then.
    shutil.copyfile(corpus / "corpus" / f"{free}.tar", tmp_path / "pairs" / f"{free}.tar")
    before = state_of(folder)
    assert run(_elsewhere(sampled, folder, tmp_path / "pairs")).scores() == open_run(sampled.run).scores()
    assert change_since(before, folder).new == Counter()


def test_the_rows_of_a_removed_shard_leave_latest(sampled, corpus, tmp_path):
    free = _out_of_the_sample(sampled)
    folder = copied(sampled.run, tmp_path)
    shutil.copytree(corpus / "corpus", tmp_path / "pairs")
    (tmp_path / "pairs" / f"{free}.tar").unlink()
    before = state_of(folder)
    outcome = run(_elsewhere(sampled, folder, tmp_path / "pairs"))
    assert change_since(before, folder) == (Counter(), set(), {f"latest/{free}.parquet"})
    assert outcome.scored == 72
    was = open_run(sampled.run).scores()
    assert outcome.scores() == was.filter(pc.not_equal(was["shard"], free))


@pytest.mark.parametrize(
    ("kind", "redone"),
    [
        ("influence", {"influence/clean": 3}),
        ("directions", {"directions/clean": 1, "misalignment": 1, "filter/clean": 1, "influence/clean": 3}),
        ("heads", {**FROM_HEADS, **times(3, OF_A_SHARD)}),
        ("fit_choice", {"fit_choice": 1, **FROM_HEADS, **times(3, OF_A_SHARD)}),
        ("copies", {**OF_EVERY_RUN, **times(3, OF_A_SHARD)}),
    ],
)
def test_another_version_of_a_kind_redoes_it_and_what_follows(finished, configure, tmp_path, monkeypatch, kind, redone):
    folder = copied(finished[0].run, tmp_path)
    before = state_of(folder)
    monkeypatch.setitem(KINDS, kind, KINDS[kind]._replace(version=KINDS[kind].version + 1))
    outcome = run(configure(folder))
    assert change_since(before, folder) == (Counter(redone), {f"latest/0000{i}.parquet" for i in range(3)}, set())
    assert outcome.scores() == finished[1].scores(), "the same inputs gave the same bytes, as the version alone has changed"


def _elsewhere(config, folder: Path, pairs: Path):
    """The configuration in another folder, with the shards of another one."""
    asked = config.model_dump(mode="json")
    return type(config).model_validate(asked | {"run": str(folder), "corpus": {"shards": str(pairs)}})


def _out_of_the_sample(config) -> str:
    """A shard that the sample has no batch of."""
    shards = [f"0000{i}" for i in range(3)]
    return min(set(shards) - in_sample(config, shards))
