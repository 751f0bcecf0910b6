"""`ecif run` with another loss, with the logit scale fitted, and with several checkpoints."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ecif.heads.cross_fit import FittedHeads
from pipeline import storage
from pipeline.errors import RunError
from pipeline.run import run
from pipeline.run_folder import tables, tensors
from pipeline.run_folder.columns import IDENTITY
from pipeline.run_folder.finished import open_run


def columns(folder):
    """The float columns of a run."""
    table = open_run(str(folder)).scores()
    return {name: table[name].to_numpy() for name in table.column_names if name not in IDENTITY}


SLOW = [pytest.param(loss, marks=pytest.mark.slow) for loss in ("dcl", "soft_infonce")]


@pytest.mark.parametrize("loss", ["siglip", *SLOW])
def test_another_loss_gives_finite_columns_whose_parts_add_up(finished, configure, tmp_path, loss):
    """With the logit scale fitted too."""
    config = configure(tmp_path, loss=loss, fit={"folds": 3, "epochs": 2, "train_logit_scale": True})
    outcome = run(config)
    assert (outcome.pairs, outcome.scored) == (108, 108)
    ours, clips = columns(tmp_path), columns(finished[0].run)
    assert ours.keys() == clips.keys()
    assert all(np.isfinite(values).all() for values in ours.values())
    parts = ours["influence_positive_clean"] + ours["influence_negative_clean"]
    assert np.allclose(parts, ours["influence_clean"], rtol=1e-5, atol=1e-5)
    assert not np.array_equal(ours["influence_clean"], clips["influence_clean"])
    (done,) = outcome.finished.checkpoints
    assert done.features == open_run(finished[0].run).checkpoints[0].features  # which no loss has a part in
    each = tensors.load(done.artifacts(config.run).url("heads"), FittedHeads).every()
    assert len({h.logit_scale for h in each}) == 8  # two checkpoints of four fits
    assert {h.train_logit_bias for h in each} == {loss == "siglip"}
    assert len({h.logit_bias for h in each}) == (8 if loss == "siglip" else 1)


@pytest.mark.slow
def test_a_loss_and_a_target_of_ones_own_run_by_their_dotted_paths(local_ray, configure, corpus, tmp_path):
    target = {"shards": str(corpus / "target"), "loss": "tests.support.own_kinds:WrongFirst", "sharpness": 0.5}
    small = {"fit": {"folds": 2, "epochs": 1, "checkpoints": 1}, "solve": {"iterations": 3, "refits": 4}, "filter": None}
    loss = {"name": "tests.support.own_kinds:AdditiveMargin", "margin": 1.0}
    outcome = run(configure(tmp_path, loss=loss, targets={"own": target}, batch_size=18, **small))
    assert (outcome.pairs, outcome.scored) == (108, 108)
    found = columns(tmp_path)["influence_own"]
    assert np.isfinite(found).all()
    assert found.std() > 0
    assert outcome.finished.config.loss.model_dump() == loss


@pytest.fixture
def checkpoints(tmp_path, tiny_model):
    """The small model's weights, and others of the same shape."""
    weights = load_file(tiny_model.removeprefix("local-dir:") + "/open_clip_model.safetensors")
    g = torch.Generator().manual_seed(7)
    paths = []
    for i, scale in enumerate((0.0, 0.05)):
        other = {k: v + scale * torch.randn(v.shape, generator=g) if v.ndim > 1 else v for k, v in weights.items()}
        paths.append(str(tmp_path / f"{i}.safetensors"))
        save_file(other, paths[-1])
    return paths


def test_the_columns_of_several_checkpoints_are_the_mean_of_each(configure, tmp_path, tiny_model, checkpoints):
    alone = []
    for path in checkpoints:  # in one folder: of what they did, nothing is done again
        run(configure(tmp_path / "run", model={"name": tiny_model, "checkpoint": path}))
        alone.append(columns(tmp_path / "run"))
    config = configure(tmp_path / "run", model={"name": tiny_model, "checkpoints": checkpoints})
    written = {item.url: item.etag for item in storage.listing(config.run, ".safetensors")}
    outcome = run(config)
    assert {item.url: item.etag for item in storage.listing(config.run, ".safetensors")} == written
    assert (outcome.pairs, outcome.scored) == (108, 108)
    assert [list(one.targets) for one in outcome.finished.checkpoints] == [["clean"], ["clean"]]
    both = columns(tmp_path / "run")
    for name, values in both.items():
        assert np.allclose(values, (alone[0][name] + alone[1][name]) / 2, rtol=1e-5, atol=1e-6)
    assert not np.allclose(alone[0]["influence_clean"], alone[1]["influence_clean"])

    _drop_a_pair_of_the_second(outcome.finished)
    with pytest.raises(RunError, match="scored different pairs"):
        run(config)


def _drop_a_pair_of_the_second(finished):
    """As if the second checkpoint could not embed one pair: no means yet, and one row less in each of a shard's tables."""
    for item in storage.listing(finished.table, ".parquet"):
        storage.delete(item.url)
    second = finished.checkpoints[1].artifacts(finished.folder)
    for key in ("pairs", "influence/clean"):
        (url,) = (item.url for item in storage.listing(second.tables(key), ".parquet") if "/00000." in item.url)
        storage.write_bytes(url, tables.parquet_bytes(tables.read_table(url).slice(1)))
