"""`score.order: 2` on real pairs with a small model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ecif.heads import embed
from ecif.heads.cross_fit import FittedHeads
from ecif.heads.curvature import gauss_newton_product, loss_gradient
from ecif.projected.curvature import damped
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import identity_projection
from ecif.projected.second_order import removal_steps, target_change
from pipeline.corpus.batches import batches_of
from pipeline.inputs import load_inputs
from pipeline.run import run
from pipeline.run_folder import tables, tensors
from pipeline.run_folder.finished import open_run
from pipeline.stages.fit.sample import read_sample
from pipeline.stages.fit.stage import as_features
from pipeline.stages.solve.targets import read_target
from tests.support.run_folders import objects, violations

CPU = torch.device("cpu")
EVERYTHING = {"repeats": 2, "order": 2, "order_rank": [999, 999]}


@pytest.fixture(scope="module")
def second(finished, configure, tmp_path_factory):
    """The finished run scored to second order, in a projection that loses nothing: its configuration."""
    folder = tmp_path_factory.mktemp("second")
    shutil.copytree(finished[0].run, folder, dirs_exist_ok=True)
    config = configure(folder, score=EVERYTHING)
    run(config)
    return config


def test_only_influence_changes_and_only_what_depends_on_the_order_is_done_again(second, finished):
    before, after = objects(finished[0].run, ".parquet", ".safetensors"), objects(second.run, ".parquet", ".safetensors")
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"curvature", "second_order", "correction"}
    first, table = open_run(finished[0].run).scores(), open_run(second.run).scores()
    assert table.column_names == [*first.column_names, "leverage"]
    for name in first.column_names:
        same = table[name].equals(first[name])
        assert same == (not name.startswith("influence"))
    parts = table["influence_positive_clean"].to_numpy() + table["influence_negative_clean"].to_numpy()
    np.testing.assert_allclose(table["influence_clean"].to_numpy(), parts, rtol=1e-6)
    assert violations(Path(second.run)) == []
    leverage = table["leverage"].to_numpy()
    assert (leverage > 0).all() and (leverage < 1).all()


@pytest.mark.slow
def test_the_same_bytes_with_another_number_of_workers(second, finished, configure, tmp_path):
    shutil.copytree(finished[0].run, tmp_path, dirs_exist_ok=True)
    run(configure(tmp_path, score=EVERYTHING, workers=2))
    assert objects(tmp_path, ".parquet", ".safetensors") == objects(second.run, ".parquet", ".safetensors")


def test_with_all_dimensions_the_correction_is_second_minus_first_order_without_a_projection(second, finished):
    done, inputs = open_run(second.run).checkpoints[0], load_inputs(second)
    sample = read_sample(inputs.corpus, second)
    question = read_target("clean", inputs.targets["clean"]).question(second)
    features = tables.read_features(inputs.corpus.features_folder("00000"), inputs.corpus.accounting()["00000"].parts)
    fold = torch.tensor(open_run(second.run).scores(["fold"])["fold"].to_numpy()[: len(features.uid)])
    fits = tensors.load(done.artifacts(second.run).url("heads"), FittedHeads).folds[1]  # fold 1 is out of sample
    kept = [rows[sample.fold[rows] != 1] for rows in sample.batches()]
    difference = torch.zeros(2, len(fold))
    for heads in fits:
        everything = identity_projection(heads)
        everyone = torch.arange(len(sample.fold))
        sampled = embed(heads, *sample.features(everyone, everyone, CPU))
        curvature = gauss_newton_product(heads, sampled, kept, torch.eye(heads.size)).double()
        damping = done.targets["clean"]["damping"] * torch.linalg.eigvalsh(curvature)[-1].item()
        solve = damped(curvature, damping).solve
        asked = embed(heads, question.loss.images, question.loss.texts)
        gradient = loss_gradient(heads, [asked.take(rows) for rows in question.batches])
        curved = gauss_newton_product(heads, asked, question.batches, torch.eye(heads.size))
        pairs = embed(heads, as_features(features.images, CPU), as_features(features.texts, CPU))
        for repeat in range(2):
            for rows in batches_of(second).of("00000", len(fold), repeat):
                batch = project_batch(heads, pairs.take(rows), everything)
                parts = pair_gradients(batch)
                steps = removal_steps(batch, *parts, solve, held_out=True)
                changes = target_change(steps, gradient[None], curved[None], held_out=True)
                for out, change, part in zip(difference, changes, parts, strict=True):
                    out[rows] += (change[0] - part @ solve(gradient[None])[0].float()) / (2 * len(fits))

    first, table = (open_run(r.run).scores()[: len(fold)] for r in (finished[0], second))  # shards by name
    for name, expected in zip(("positive", "negative"), difference, strict=True):
        column = f"influence_{name}_clean"
        correction = table[column].to_numpy().astype(float) - first[column].to_numpy()
        mine = (fold == 1).numpy()
        assert mine.sum() > 5
        error = np.linalg.norm(correction[mine] - expected.numpy()[mine])
        assert error < 2e-3 * np.linalg.norm(expected.numpy()[mine])
