"""The columns of a run are those of `ecif.attribute` on the same features in memory."""

import numpy as np
import pytest
import torch

import ecif
from ecif.towers import load
from pipeline.config import Config
from pipeline.inputs import load_inputs
from pipeline.run import run
from pipeline.run_folder import tables
from pipeline.run_folder.columns import columns
from pipeline.stages.solve.targets import read_target


def in_memory(config: Config) -> dict[str, torch.Tensor]:
    """`attribute` on the features that a run left, as someone would call it who has only these."""
    _, corpus, clean = load_inputs(config)
    parts = {name: tables.read_features(corpus.features_folder(name), a.parts) for name, a in corpus.accounting().items()}
    images, texts = (torch.tensor(np.concatenate([getattr(p, side) for p in parts.values()])) for side in ("images", "texts"))
    targets = {name: read_target(name, dataset) for name, dataset in clean.items()}
    settings = ecif.Settings(
        loss=config.loss.build(),
        batch_size=config.batch_size,
        folds=config.fit.folds,
        epochs=config.fit.epochs,
        iterations=config.solve.iterations,
        refits=config.solve.refits,
        dampings=config.solve.dampings,
        target_batch=config.solve.target_batch,
        repeats=config.score.repeats,
        columns=config.score.columns,
    )
    return ecif.attribute(
        images,
        texts,
        {name: target.question(config).loss for name, target in targets.items()},
        heads=load(config.model.name, config.model.checkpoint).heads,
        settings=settings,
        uids=[uid for part in parts.values() for uid in part.uid],
        shards=[shard for shard, part in parts.items() for _ in part.uid],
    )


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_the_columns_of_a_run_are_those_of_the_method_in_memory(loss, local_ray, configure, corpus, tmp_path):
    clean = {"shards": str(corpus / "target")}
    targets = {"clean": clean, "other": clean | {"loss": "retrieval_margin"}}
    baselines = ["negclip_loss", "normsim_2", "normsim_inf", "lemon", "gsc", "gradient_norm"]
    config = configure(tmp_path, loss=loss, targets=targets, score={"repeats": 2, "columns": baselines})
    ours, theirs = run(config).scores(), in_memory(config)
    assert list(theirs) == [column.name for column in columns(config)]
    for name, values in theirs.items():
        expected = values.double().numpy()
        assert np.abs(ours[name].to_numpy() - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max()), name
