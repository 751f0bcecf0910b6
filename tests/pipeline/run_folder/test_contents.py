"""What was read, as names see it: a sample is the batches that are in it, whatever else the corpus holds."""

import pytest

from ecif.batching import choose_batches
from pipeline.config import Config
from pipeline.corpus.batches import batches_of
from pipeline.run_folder.artifacts import Artifacts
from pipeline.run_folder.contents import contents, find_artifacts, sampled
from tests.support.embedded import embedded

SIZE = 16  # pairs of a batch
CONFIG = Config.model_validate(
    {"run": "run", "corpus": {"shards": "x"}, "model": {"name": "x"}, "targets": {"a": {"shards": "x"}}}
    | {"batch_size": SIZE, "fit": {"sample": 6 * SIZE}, "index": {}}
)
CORPUS = {f"{i:05d}": 2 * SIZE for i in range(30)}


def read(shards, config: Config = CONFIG) -> Artifacts:
    targets = {name: embedded(config, target, {"t": 8}) for name, target in config.targets.items()}
    return find_artifacts(config, embedded(config, config.corpus, shards), targets)


def renamed(before: Artifacts, after: Artifacts) -> set[str]:
    return {key for key, name in before.names.items() if after.names[key] != name}


def chosen(shards: dict[str, int], config: Config = CONFIG) -> dict[str, list[int]]:
    return choose_batches(shards, batches_of(config), config.fit.sample)


def test_most_nights_with_a_new_shard_leave_the_sample_as_it_was():
    """Heads and directions are then what they are, and only what is new is computed."""
    shards, left_alone = dict(CORPUS), 0
    before, sample = read(shards), chosen(shards)
    for night in range(60):
        shards = shards | {f"night/{night:05d}": 2 * SIZE}
        after, now = read(shards), chosen(shards)
        if now == sample:
            left_alone += 1
            assert renamed(before, after) == {"index_curvature", "self_influence"}  # sums over the whole corpus
        else:
            assert {"heads", "evidence", "directions/a", "filter/a", "pairs", "index"} <= renamed(before, after)
        assert before.shards.items() <= after.shards.items()
        before, sample = after, now
    print(f"{left_alone} of 60 nights left the sample as it was")
    # Of n batches a new one is among the 6 of smallest hash with probability 6 / n; over all nights that is expected 6 times.
    assert left_alone >= 50


def test_a_sampled_shard_that_changes_is_another_sample_and_one_that_is_not_sampled_is_not():
    inside = chosen(CORPUS)
    for shard, count in CORPUS.items():
        found = renamed(read(CORPUS), read(CORPUS | {shard: (count, "other bytes")}))
        assert ("heads" in found) == (shard in inside)
    outside = next(shard for shard in CORPUS if shard not in inside)
    assert renamed(read(CORPUS), read(CORPUS | {outside: (CORPUS[outside], "other bytes")})) == {
        "index_curvature",
        "self_influence",
    }


def test_a_table_of_a_shard_that_changed_has_another_name():
    before, after = read(CORPUS), read(CORPUS | {"00000": (2 * SIZE, "other bytes")})
    assert {shard for shard in CORPUS if before.shards[shard] != after.shards[shard]} == {"00000"}


def test_shards_without_usable_pairs_are_no_part_of_anything():
    found = read(CORPUS | {"empty": 0})
    assert "empty" not in found.shards
    assert found.names == read(CORPUS).names


def test_the_sample_of_a_run_is_of_the_pairs_that_can_be_used():
    corpus = embedded(CONFIG, CONFIG.corpus, CORPUS | {"empty": 0})
    assert sampled(CONFIG, corpus.accounting(), 6 * SIZE) == chosen(CORPUS)


def test_forward_mode_knows_how_many_pairs_its_sample_stands_for():
    forward = {"index": None, "scoring": {"mode": "forward", "parameters": ["*"], "sample": 6 * SIZE}}
    config = Config.model_validate(CONFIG.model_dump() | forward)
    outside = next(shard for shard in CORPUS if shard not in chosen(CORPUS, config))
    assert renamed(read(CORPUS, config), read(CORPUS | {outside: (2 * SIZE, "other bytes")}, config)) == set()
    fewer = renamed(read(CORPUS, config), read({s: n for s, n in CORPUS.items() if s != outside}, config))
    assert fewer == {"forward_directions/a", "forward_influence/a", "scores"}


@pytest.mark.parametrize("change", [{"t": (8, "other bytes")}, {"t": 8, "u": 8}])
def test_a_target_that_changes_asks_another_question_and_leaves_the_corpus_alone(change):
    corpus = embedded(CONFIG, CONFIG.corpus, CORPUS)
    before, after = (
        contents(CONFIG, corpus, {"a": embedded(CONFIG, CONFIG.targets["a"], shards)}).of for shards in ({"t": 8}, change)
    )
    assert {name for name in before if before[name] != after[name]} == {"target/a", "question/a"}
