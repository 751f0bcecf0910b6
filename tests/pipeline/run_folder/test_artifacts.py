"""Names say what an object depends on, no more and no less: a change renames what it changes, and nothing else."""

from copy import deepcopy
from typing import Any, get_args

import numpy as np
import pytest
import torch

from ecif.batching import Shuffled
from ecif.columns import ClipScore, NegClipLoss
from ecif.losses import Clip
from ecif.targets import RetrievalMargin
from pipeline import storage
from pipeline.config import Config
from pipeline.inputs import as_dataset
from pipeline.run_folder.artifacts import KINDS, Artifacts, fingerprint, instances
from pipeline.run_folder.contents import find_artifacts
from pipeline.sections import Model, Prices
from tests.support.embedded import embedded

NEEDED: dict[str, Any] = {"run": "run", "corpus": {"shards": "x"}, "model": {"name": "x"}, "batch_size": 4}
HEADS = NEEDED | {
    "targets": {"a": {"shards": "x"}, "b": {"shards": "x", "loss": "retrieval_margin"}},
    "score": {"columns": ["negclip_loss", "normsim_2"]},
    "index": {},
}
ORDER_TWO = NEEDED | {"targets": {"a": {"shards": "x"}, "b": {"shards": "x"}}, "score": {"order": 2}}
FORWARD = ORDER_TWO | {"score": {}, "scoring": {"mode": "forward", "parameters": ["visual.*"], "epochs": 1}}

# Sets of names, for the tables below.
OF_A, OF_B = ("directions/{0} filter/{0} influence/{0}".format(target) for target in "ab")  # noqa: UP032  (twice)
TARGETS = f"{OF_A} {OF_B} misalignment scores"
COLUMNS = "column/negclip_loss column/normsim_2_a column/normsim_2_b"
INDEX = "index_projection index index_curvature self_influence"
FROM_HEADS = f"heads evidence pairs {TARGETS} {COLUMNS} {INDEX}"
FROM_FITS = f"fit_choice {FROM_HEADS}"
EVERYTHING = f"copies {FROM_FITS}"
FEATURES = "features features/a features/b"
SECOND = "second_order/a second_order/b correction/a correction/b"
DIRECTIONS = "forward_directions/a forward_directions/b forward_influence/a forward_influence/b"
NOTHING = ""

# A key, another value, and what it renames.
KEYS_OF_HEADS = [
    ("workers", 3, NOTHING),
    ("device", "gpu", NOTHING),
    *((f"prices.{key}", 2.0, NOTHING) for key in Prices.model_fields),
    ("embed.max_bad_fraction", 0.5, NOTHING),
    ("embed.max_bad_fraction_of_shard", 0.5, NOTHING),
    ("embed.max_pixels", 1000, f"{FEATURES} {EVERYTHING}"),
    ("embed.max_member_bytes", 1000, f"{FEATURES} {EVERYTHING}"),
    ("embed.part_size", 7, f"{FEATURES} {EVERYTHING}"),
    ("embed.precision", "bf16", f"{FEATURES} {EVERYTHING}"),
    ("embed.resize", "fast", f"{FEATURES} {EVERYTHING}"),
    ("corpus.caption", "laion", f"features {EVERYTHING}"),
    ("corpus.caption", {"field": "txt", "pick": None}, NOTHING),  # what `txt` is short for
    ("corpus.caption", {"field": "txt", "pick": "first"}, f"features {EVERYTHING}"),
    ("corpus.caption", {"field": "txt", "pick": "all"}, f"features {EVERYTHING}"),
    ("corpus.key", "first_dot", NOTHING),  # what it is by default
    ("corpus.key", "last_dot", f"features {EVERYTHING}"),
    ("corpus.missing", "skip", NOTHING),  # the shards that are there matter
    ("corpus.root", "/", NOTHING),  # the shards' names matter, and not how they came to have them
    ("corpus.sidecar", ["width"], "scores"),
    ("targets.b.caption", "laion", f"features/b {OF_B} column/normsim_2_b misalignment scores"),
    ("targets.b.margin", 0.3, f"{OF_B} misalignment scores"),
    ("targets.a.calibrated", True, f"{OF_A} misalignment scores"),
    ("targets.a.loss", "retrieval_margin", f"{OF_A} misalignment scores"),
    ("batch_size", 5, EVERYTHING),
    ("seed", 1, EVERYTHING),
    ("fit.sample", 50_000, NOTHING),  # by itself: the pairs that it chooses matter
    ("fit.sample", 8, EVERYTHING),
    ("fit.folds", 3, EVERYTHING),
    ("fit.seeds", 2, FROM_HEADS),
    ("fit.epochs", 3, FROM_FITS),
    ("fit.learning_rate", 0.1, FROM_FITS),
    ("fit.pull", 0.1, FROM_FITS),
    ("fit.checkpoints", 1, FROM_FITS),
    ("solve.iterations", 8, TARGETS),
    ("solve.refits", 8, TARGETS),
    ("solve.dampings", [0.1, 0.2], TARGETS),
    ("solve.target_batch", 7, TARGETS),
    ("score.repeats", 3, f"evidence pairs {COLUMNS} {TARGETS}"),
    ("score.repeats", 4, NOTHING),  # what it is by default
    ("score.negative", "taylor", f"{TARGETS} index index_curvature self_influence"),
    ("score.order_rank", (8, 8), NOTHING),  # of an order that is not asked for
    ("filter.seeds", 3, "filter/a filter/b scores"),
    ("nightly.renew", {"every": 7}, NOTHING),
    ("nightly.deadline_hours", 1.0, NOTHING),
    ("nightly.drift", {"features": 0.8}, NOTHING),
    ("index.rank", (8, 8), INDEX),
    ("index.projection", "random", INDEX),
    ("index.damping", 0.1, "self_influence"),
]
KEYS_WITHOUT_INDEX = [
    ("loss", "dcl", f"fit_choice heads evidence pairs {TARGETS} {COLUMNS}"),
    ("fit.train_logit_scale", True, f"fit_choice heads evidence pairs {TARGETS} {COLUMNS}"),
]
KEYS_OF_ORDER_TWO = [
    ("score.order_rank", (8, 8), f"curvature {SECOND} scores"),
    ("score.negative", "taylor", f"{TARGETS} {SECOND}"),
    ("score.repeats", 3, f"evidence pairs {TARGETS} {SECOND}"),
    ("solve.iterations", 8, f"{TARGETS} {SECOND}"),
    ("filter.seeds", 3, "filter/a filter/b scores"),
    ("fit.epochs", 3, f"fit_choice heads evidence pairs {TARGETS} curvature {SECOND}"),
]
KEYS_OF_FORWARD = [
    ("scoring.parameters", ["*"], f"parameters {DIRECTIONS} scores"),
    ("scoring.epochs", 2, f"parameters {DIRECTIONS} scores"),
    ("scoring.learning_rate", 0.1, f"parameters {DIRECTIONS} scores"),
    ("scoring.damping", 0.1, f"{DIRECTIONS} scores"),
    ("scoring.iterations", 9, f"{DIRECTIONS} scores"),
    ("scoring.tolerance", 0.1, f"{DIRECTIONS} scores"),
    ("scoring.sample", 3000, NOTHING),  # by itself, as fit.sample
    ("scoring.sample", 8, f"parameters {DIRECTIONS} scores"),
    ("filter.seeds", 3, "filter/a filter/b scores"),
    ("fit.epochs", 3, f"fit_choice heads evidence pairs {TARGETS} {DIRECTIONS}"),  # by default the damping is that of the heads
]
KEYS = ((HEADS, KEYS_OF_HEADS), (HEADS | {"index": None}, KEYS_WITHOUT_INDEX), (ORDER_TWO, KEYS_OF_ORDER_TWO))
TABLE = [(base, *row) for base, keys in (*KEYS, (FORWARD, KEYS_OF_FORWARD)) for row in keys]


def named(settings: dict[str, Any]) -> dict[str, str]:
    """The name of everything that a run writes, of features too."""
    config = Config.model_validate(settings)
    corpus = embedded(config, config.corpus, {"00000": 10, "00001": 9, "00002": 12, "empty": 0})
    targets = {name: embedded(config, target, {"t": 6}) for name, target in config.targets.items()}
    features = {"features": corpus.fingerprint} | {f"features/{name}": target.fingerprint for name, target in targets.items()}
    return find_artifacts(config, corpus, targets).names | features


def changed(settings: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The settings with another value of one key."""
    *sections, last = key.split(".")
    settings = deepcopy(settings)
    place = settings
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return settings


def renamed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """What both runs write, under other names."""
    return {key for key in before.keys() & after.keys() if before[key] != after[key]}


@pytest.mark.parametrize(("base", "key", "value", "kinds"), TABLE, ids=lambda part: part if isinstance(part, str) else "")
def test_a_changed_key_renames_what_depends_on_it(base, key, value, kinds):
    before, after = named(base), named(changed(base, key, value))
    assert before.keys() == after.keys()
    assert renamed(before, after) == set(kinds.split())


def test_the_table_has_every_key():
    """Those that are left out say what is read and what is written, which the tests below add to and take away from."""
    others = {"run", "corpus.shards", "corpus.uid", "targets", "batching", "score.order", "score.columns", "scoring.mode"}
    others |= {f"model.{key}" for key in Model.model_fields}
    known = others | {key for _, key, _, _ in TABLE}
    for name, field in Config.model_fields.items():
        section = (get_args(field.annotation) or (field.annotation,))[0]
        below = {} if name in ("targets", "loss") else getattr(section, "model_fields", {})
        assert ({f"{name}.{key}" for key in below} or {name}) <= known


@pytest.mark.parametrize(
    ("key", "value", "added", "kinds"),
    [
        (
            "targets.c",
            {"shards": "x"},
            "features/c directions/c filter/c influence/c column/normsim_2_c",
            "misalignment scores",
        ),
        ("score.columns", ["negclip_loss", "normsim_2", "gsc"], "column/gsc", "scores"),
        ("score.columns", ["normsim_2", "negclip_loss", "negclip_loss"], NOTHING, "scores"),  # another order of the columns
    ],
)
def test_what_is_added_renames_only_what_everything_is_put_together_in(key, value, added, kinds):
    before, after = named(HEADS), named(changed(HEADS, key, value))
    assert after.keys() - before.keys() == set(added.split())
    assert renamed(before, after) == set(kinds.split())


@pytest.mark.parametrize(
    ("key", "value", "gone", "kinds"),
    [
        ("index", None, INDEX, NOTHING),
        ("filter", None, "filter/a filter/b", "scores"),
        ("score.columns", [], COLUMNS, "scores"),
        ("targets", {"a": {"shards": "x"}}, f"features/b {OF_B} column/normsim_2_b", "misalignment scores"),
    ],
)
def test_what_is_left_out_renames_nothing_else(key, value, gone, kinds):
    before, after = named(HEADS), named(changed(HEADS, key, value))
    assert before.keys() - after.keys() == set(gone.split())
    assert renamed(before, after) == set(kinds.split())


def test_a_score_that_is_evidence_renames_all_that_misalignment_is_part_of():
    before = named(HEADS)
    after = named(changed(HEADS, "score.columns", ["negclip_loss", "normsim_2", "tests.support.own_scores:SameLength"]))
    assert before.keys() == after.keys()
    assert renamed(before, after) == set(f"evidence pairs {COLUMNS} filter/a filter/b misalignment scores".split())


@pytest.mark.parametrize(
    ("base", "kind", "kinds"),
    [
        (HEADS, "features", f"{FEATURES} {EVERYTHING}"),
        (HEADS, "copies", EVERYTHING),
        (HEADS, "fit_choice", FROM_FITS),
        (HEADS, "heads", FROM_HEADS),
        (HEADS, "evidence", f"evidence pairs {COLUMNS} filter/a filter/b misalignment scores"),
        (HEADS, "directions", TARGETS),
        (HEADS, "misalignment", "misalignment scores"),
        (HEADS, "filter", "filter/a filter/b scores"),
        (HEADS, "pairs", "pairs scores"),
        (HEADS, "influence", "influence/a influence/b scores"),
        (HEADS, "column", f"{COLUMNS} scores"),
        (HEADS, "scores", "scores"),
        (HEADS, "index_projection", INDEX),
        (HEADS, "index", "index index_curvature self_influence"),
        (HEADS, "index_curvature", "index_curvature self_influence"),
        (HEADS, "self_influence", "self_influence"),
        (ORDER_TWO, "curvature", f"curvature {SECOND} scores"),
        (ORDER_TWO, "second_order", f"{SECOND} scores"),
        (ORDER_TWO, "correction", "correction/a correction/b scores"),
        (FORWARD, "parameters", f"parameters {DIRECTIONS} scores"),
        (FORWARD, "forward_directions", f"{DIRECTIONS} scores"),
        (FORWARD, "forward_influence", "forward_influence/a forward_influence/b scores"),
    ],
)
def test_another_version_of_a_kind_renames_it_and_what_follows(monkeypatch, base, kind, kinds):
    before = named(base)
    monkeypatch.setitem(KINDS, kind, KINDS[kind]._replace(version=KINDS[kind].version + 1))
    assert renamed(before, named(base)) == set(kinds.split())


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        (Clip, FROM_FITS),
        (Shuffled, EVERYTHING),
        (RetrievalMargin, f"{OF_B} misalignment scores"),
        (NegClipLoss, "column/negclip_loss scores"),
        (ClipScore, f"evidence pairs {COLUMNS} filter/a filter/b misalignment scores"),
    ],
)
def test_another_version_of_a_loss_a_target_a_batching_or_a_score_renames_what_it_computes(monkeypatch, kind, kinds):
    before = named(HEADS)
    monkeypatch.setattr(kind, "version", kind.version + 1)
    assert renamed(before, named(HEADS)) == set(kinds.split())


@pytest.mark.parametrize("base", [HEADS, ORDER_TWO, FORWARD])
def test_everything_that_is_asked_for_has_a_name_of_its_own_and_the_same_in_every_call(base):
    config, found = Config.model_validate(base), named(base)
    asked = [key for kind, what in KINDS.items() if what.asked(config) for key, _ in instances(kind, config)]
    assert found.keys() - set(FEATURES.split()) == set(asked) - {"features"}
    assert len({found[key] for key in asked if key != "features"}) == len(asked) - 1
    assert named(base) == found


def test_a_kind_is_made_of_kinds_before_it_and_reads_keys_that_exist():
    config, known = Config.model_validate(HEADS), set()
    contents = {"batches", "sample", "forward_sample", "target", "question", "corpus", "corpus_size"}
    for kind, what in KINDS.items():
        assert set(what.made_of) <= known | contents
        known.add(kind)
        for key in what.reads:
            section, _, last = key.partition(".")
            assert hasattr(getattr(config, section), last) if last else hasattr(config, section)


def test_keys_that_came_later_leave_the_names_of_features_at_their_defaults():
    config = Config.model_validate(changed(HEADS, "corpus.caption", "laion"))
    found = as_dataset("run", config.corpus, [], ["made by"]).fingerprint
    assert found == fingerprint([KINDS["features"].version], ["made by"], "laion", [])


@pytest.mark.parametrize(
    "value",
    [np.zeros(3), np.float32(1), torch.zeros(3), {1, 2}, b"bytes", object(), Clip],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_plain_text_has_no_fingerprint(value):
    for part in (value, [1, value], {"key": {"nested": value}}):
        with pytest.raises(TypeError):
            fingerprint("a", part)


def test_a_fingerprint_does_not_depend_on_the_order_of_a_dictionary_and_on_all_else():
    assert fingerprint({"a": 1, "b": [2.5, None]}) == fingerprint({"b": [2.5, None], "a": 1})
    values = ["1", 1, 1.5, True, None, [1], [[1]], {"a": 1}, {"a": "1"}, []]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint(1, 2) != fingerprint([1, 2]) != fingerprint(12)
    assert fingerprint("pinned", [1, {"a": None}]) == "888c73d991c18a3d"


def test_the_table_of_a_shard_is_that_of_its_content(tmp_path):
    artifacts = Artifacts(str(tmp_path), {"influence/a": "0123", "pairs": "4567"}, {"s": "c0", "s/t": "c1", "other": "c2"})
    written = {"influence/a": ["s.c0", "s/t.c1", "other.old"], "pairs": ["other.c2"]}
    for key, names in written.items():
        for name in names:
            storage.write_bytes(f"{artifacts.tables(key)}/{name}.parquet", b"table")
    found = artifacts.listed("influence/a")
    assert {shard: item.url for shard, item in found.items()} == {
        "s": f"{tmp_path}/influence/a/0123/s.c0.parquet",
        "s/t": f"{tmp_path}/influence/a/0123/s/t.c1.parquet",
    }
    assert all(artifacts.table("influence/a", shard) == item.url for shard, item in found.items())
    assert artifacts.listed("pairs").keys() == {"other"}
    assert artifacts.url("pairs") == f"{tmp_path}/pairs/4567.safetensors"
