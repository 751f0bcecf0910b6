"""A user's own loss and target, named by a dotted path, are as good as those of the package."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ecif.heads import embed, logits
from ecif.heads.curvature import gauss_newton_product
from ecif.heads.fit import fixed_batches
from ecif.heads.influence import score
from ecif.losses import Clip
from pipeline.config import Config
from pipeline.stages.losses import loss_of
from pipeline.stages.solve.targets import TargetFeatures
from tests.support.own_kinds import AdditiveMargin
from tests.support.problems import fit_one, flat, random_features, random_heads

OWN_LOSS, OWN_TARGET = "tests.support.own_kinds:AdditiveMargin", "tests.support.own_kinds:WrongFirst"
HEADS, (IMAGES, TEXTS) = random_heads(), random_features(12)
BATCHES = list(torch.arange(12).split(6))


def configure(trained_with="clip", **target) -> Config:
    base = {"run": "run", "corpus": {"shards": "x"}, "model": {"name": "x"}}
    return Config.model_validate(base | {"loss": trained_with, "targets": {"a": {"shards": "x"} | target}})


def test_a_loss_of_ones_own_has_keys_of_its_own():
    config = configure({"name": OWN_LOSS, "margin": 3})
    assert loss_of(config) == AdditiveMargin(3.0)
    assert loss_of(configure(OWN_LOSS)) == AdditiveMargin()
    assert config.loss.question() == {"kind": OWN_LOSS, "version": 1, "options": {"margin": 3.0}}
    for copy in (Config.model_validate(json.loads(json.dumps(config.model_dump()))), pickle.loads(pickle.dumps(config))):
        assert copy == config
        assert loss_of(copy) == AdditiveMargin(3.0)


def test_a_registered_name_of_ones_own_is_kept_as_a_path_which_workers_can_follow():
    assert configure("additive_margin").loss.name == OWN_LOSS
    assert configure("ecif.losses.dcl:Dcl").loss.name == "dcl"


def test_taylor_reaches_the_loss_that_knows_it():
    base = configure().model_dump()
    assert loss_of(Config.model_validate(base | {"score": {"negative": "taylor"}})) == Clip("taylor")


def test_a_question_changes_with_the_version_of_a_kind(monkeypatch):
    before = configure(OWN_LOSS).loss.question()
    monkeypatch.setattr(AdditiveMargin, "version", 2)
    assert configure(OWN_LOSS).loss.question() != before


@pytest.mark.parametrize(
    ("loss", "target", "where", "said"),
    [
        ("tests.support.nowhere:Focal", {}, "loss", "can't be imported: No module named 'tests.support.nowhere'"),
        ("tests.support.own_kinds:Focal", {}, "loss", "has no attribute 'Focal'"),
        (":Focal", {}, "loss", "can't be imported"),
        (OWN_TARGET, {}, "loss", "is no subclass of ecif.losses.contract.Loss"),
        ("tests.support.own_kinds:WithoutPairLoss", {}, "loss", "does not define pair_loss"),
        ({"name": OWN_LOSS, "gamma": 1}, {}, "loss.gamma", "Extra inputs are not permitted"),
        ({"name": OWN_LOSS, "margin": -1}, {}, "loss.margin", "greater than or equal to 0"),
        ("clip", {"loss": OWN_LOSS}, "targets.a.loss", "is no subclass of ecif.targets.contract.TargetLoss"),
        ("clip", {"loss": OWN_TARGET, "sharpness": 0}, "targets.a.sharpness", "greater than 0"),
        ("clip", {"loss": OWN_TARGET, "calibrated": True}, "targets.a.calibrated", "Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_with_ones_own_is_one_line_about_its_key(loss, target, where, said):
    with pytest.raises(ValidationError) as caught:
        configure(loss, **target)
    (error,) = caught.value.errors()
    assert ".".join(error["loc"]) == where
    assert said in error["msg"]
    assert "\n" not in error["msg"]


def test_a_kind_of_a_script_is_refused_as_no_worker_can_import_it(monkeypatch):
    monkeypatch.setattr(AdditiveMargin, "__module__", "__main__")
    with pytest.raises(ValidationError, match="move it to a module, which workers can import"):
        configure("additive_margin")


def test_everything_that_a_loss_does_not_define_follows_from_deletion_and_autograd():
    loss = loss_of(configure(OWN_LOSS))
    pairs = embed(HEADS, IMAGES, TEXTS)
    direction = torch.randn(1, len(flat(HEADS)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, step = score(HEADS, pairs, BATCHES, direction, loss), 1e-6

    def moved(sign):
        image, text = HEADS.split(flat(HEADS) + sign * step * direction[0])
        return HEADS._replace(image=image, text=text)

    def batch_loss(heads, rows):
        return loss.batch_loss(logits(heads, embed(heads, IMAGES[rows], TEXTS[rows])))

    def removed(heads, n):
        rows = BATCHES[n // 6]
        return batch_loss(heads, rows) - batch_loss(heads, rows[rows != n])

    slope = torch.stack([(removed(moved(1), n) - removed(moved(-1), n)) / (2 * step) for n in range(12)])
    assert torch.allclose((found.positive + found.negative)[0], slope, rtol=1e-5, atol=1e-7)
    curved = gauss_newton_product(HEADS, pairs, BATCHES, direction, loss)
    assert (curved * direction).sum() > 0
    how = {"batch_size": 6, "epochs": 5, "learning_rate": 0.05, "seed": 0, "loss": loss}
    *_, fitted = fit_one(HEADS, IMAGES, TEXTS, fixed_batches(BATCHES), **how)
    assert sum(batch_loss(fitted, rows) for rows in BATCHES) < sum(batch_loss(HEADS, rows) for rows in BATCHES)


def test_a_target_of_ones_own_is_asked_with_its_option():
    config = configure("clip", loss=OWN_TARGET, sharpness=0.5)
    assert config.targets["a"].question() == {"kind": OWN_TARGET, "version": 1, "options": {"sharpness": 0.5}}
    question = TargetFeatures("a", IMAGES.numpy().astype(np.float16), TEXTS.numpy().astype(np.float16)).question(config)
    heads, loss = HEADS._replace(image=HEADS.image.float(), text=HEADS.text.float()), question.loss
    similarity = torch.cat([s.flatten() for s in loss.similarities(heads, [torch.arange(12)])]).view(12, 12)
    count = sum(torch.sigmoid(0.5 * (similarity[i, j] - similarity[i, i])) for i in range(12) for j in range(12) if i != j)
    assert torch.allclose(loss.value(heads, [torch.arange(12)]), count)
    along = question.gradient(heads, [torch.arange(12)])
    image, text = heads.split(1e-3 * along / along.norm())
    ends = [
        loss.value(heads._replace(image=heads.image + s * image, text=heads.text + s * text), [torch.arange(12)])
        for s in (1, -1)
    ]
    assert ((ends[0] - ends[1]) / 2e-3).item() == pytest.approx(along.norm().item(), rel=0.02)


def test_a_configuration_can_be_imported_without_torch():
    code = "import sys, pipeline.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
