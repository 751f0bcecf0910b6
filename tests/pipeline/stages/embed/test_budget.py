"""A run whose pairs mostly can't be used is wrong itself, and ends with one line that says why."""

import pytest

from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.inputs import as_dataset, made_by
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Embed, Reading
from pipeline.stages.embed.budget import ENOUGH, Budget


def shard(name="a/0", pairs=100, successes=None, **quarantined) -> Accounting:
    embedded = pairs - sum(quarantined.values())
    return Accounting(name, 1, "", "", 0, 0, 0, pairs, embedded, quarantined, 1, None, successes)


def budget(**limits) -> Budget:
    return Budget(Dataset("run", "id", [], Reading()), Embed(**limits))


def test_the_share_of_the_run_is_judged_at_its_end():
    spent = budget(max_bad_fraction=0.2)
    spent.spend(shard(missing_caption=99))
    for _ in range(4):
        spent.spend(shard())
    spent.settle()  # 99 of 500
    spent.spend(shard(pairs=2, missing_caption=2))
    with pytest.raises(RunError) as ended:
        spent.settle()
    said = "run: 101 of 502 pairs can't be used (101 missing_caption), more than embed.max_bad_fraction = 0.2"
    assert str(ended.value) == f"{said}; see run/quarantine/id"


def test_a_part_of_a_corpus_is_judged_with_the_pairs_of_the_rest():
    part = Dataset("run", "id", [], Reading()).of([], others=400)
    spent = Budget(part, Embed(max_bad_fraction=0.2))
    spent.spend(shard(missing_caption=100))
    spent.settle()  # 100 of 500
    spent.spend(shard(pairs=1, missing_caption=1))
    with pytest.raises(RunError, match="101 of 501 pairs"):
        spent.settle()


def test_a_run_of_which_enough_was_seen_ends_early():
    spent = budget()
    spent.spend(shard(pairs=ENOUGH - 1, missing_caption=ENOUGH - 1))
    with pytest.raises(RunError, match=f"{ENOUGH} of {ENOUGH} pairs"):
        spent.spend(shard(pairs=1, missing_caption=1))


def test_a_shard_can_have_a_budget_of_its_own():
    budget().spend(shard(bad_json=100))
    budget(max_bad_fraction_of_shard=0.1).spend(shard(bad_json=10))
    with pytest.raises(RunError, match=r"a/0: 11 of 100 .*\(10 bad_json, 1 empty_caption\).*quarantine/id/a/0.parquet"):
        budget(max_bad_fraction_of_shard=0.1).spend(shard(bad_json=10, empty_caption=1))


def test_pairs_that_are_counted_and_not_there_are_bad_pairs():
    budget(max_bad_fraction_of_shard=0.5).spend(shard(pairs=50, successes=100))
    budget(max_bad_fraction_of_shard=0).spend(shard(pairs=50, successes=40))  # more than counted: said, not lost
    with pytest.raises(RunError, match=r"51 of 100 pairs can't be used \(51 lost\)"):
        budget(max_bad_fraction_of_shard=0.5).spend(shard(pairs=49, successes=100))


def test_nothing_is_within_every_budget():
    spent = budget(max_bad_fraction=0, max_bad_fraction_of_shard=0)
    spent.spend(shard(pairs=0))
    spent.settle()


def test_a_budget_changes_no_features_and_a_limit_does():
    class Model:
        fingerprint = "model"

    def features(**embed) -> str:
        base = {"run": "run", "corpus": {"shards": "a"}, "model": {"name": "m"}, "targets": {"t": {"shards": "b"}}}
        config = Config.model_validate(base | {"embed": embed})
        return as_dataset("run", config.corpus, [], made_by(Model(), config)).fingerprint

    assert features() == features(max_bad_fraction=0.9, max_bad_fraction_of_shard=0.1) != features(max_pixels=1000)
