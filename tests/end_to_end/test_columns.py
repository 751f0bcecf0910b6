"""The columns of `score.columns` in a run: computed as `ecif.columns` does from the run's features, and described."""

import numpy as np
import pytest
import torch

from ecif.batching import Shuffled
from ecif.columns import Column, HeldOutPairs, PairScore, held_out_values
from ecif.columns.evidence import Evidence
from ecif.heads.cross_fit import FittedHeads
from ecif.losses import CLIP
from ecif.registry import find_kind
from pipeline.inputs import load_inputs
from pipeline.run_folder import tables, tensors
from tests.support.corpora import BASELINES


@pytest.fixture(scope="module")
def computed(everything):
    """Every baseline of every pair, from the features: column -> values, in the order of the table."""
    config, outcome = everything
    inputs, artifacts = load_inputs(config), outcome.finished.checkpoints[0].artifacts(config.run)
    ends = tensors.load(artifacts.url("heads"), FittedHeads).ends
    bank = tensors.load(artifacts.url("evidence"), Evidence).bank

    def features(dataset, shard):
        found = tables.read_features(dataset.features_folder(shard), dataset.accounting()[shard].parts)
        return found.uid, *(torch.from_numpy(side).float() for side in (found.images, found.texts))

    target = features(inputs.targets["clean"], "00000")[1]
    values = {name: [] for name in BASELINES}
    folds = {shard: part["fold"].to_pylist() for shard, part in outcome.finished.of_shards(["fold"])}
    for shard in (shard.name for shard in inputs.corpus.shards):
        uid, images, texts = features(inputs.corpus, shard)
        batches = [rows for repeat in range(2) for rows in Shuffled(16, config.seed).of(shard, len(uid), repeat)]
        fold = torch.tensor(folds[shard])
        pairs = HeldOutPairs(images, texts, fold, batches, inputs.model.heads, [], CLIP, bank, target)
        for name in BASELINES:
            values[name].append(held_out_values(find_kind(PairScore, name)(), pairs, ends))
    return {name: torch.cat(of_shards).numpy() for name, of_shards in values.items()}


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_column_is_what_its_score_computes_from_the_features(everything, computed, name):
    column = Column.of(find_kind(PairScore, name), "clean").name
    found = everything[1].scores()[column].to_numpy()
    assert np.isfinite(found).all()
    assert found.std() > 0
    np.testing.assert_allclose(found, computed[name], rtol=1e-5, atol=1e-6)


def test_the_schema_says_what_every_column_means_and_which_run_it_is_from(everything):
    finished = everything[1].finished
    schema = finished.scores().schema
    assert schema.metadata[b"ecif.run"]
    for field in schema:
        assert field.metadata[b"says"], field.name
    for name in BASELINES:
        score = find_kind(PairScore, name)
        described = Column.of(score, "clean")
        found = {key.decode(): value.decode() for key, value in schema.field(described.name).metadata.items()}
        assert found == {"says": score.says, "unit": score.unit, "good": score.good}
