"""A target of a run asks its own question wherever it is asked: of refits, of the direction, of the judge."""

import numpy as np
import pytest
import torch

from ecif.heads import Heads
from pipeline.config import Config
from pipeline.config import Target as Settings
from pipeline.errors import RunError
from pipeline.inputs import load_inputs
from pipeline.stages.fit.sample import Sample
from pipeline.stages.solve.targets import Target, coverage, gradient, group_losses, groups, target_loss

G = torch.Generator().manual_seed(0)
CONFIG = Config.model_validate(
    {"run": "run", "corpus": {"shards": "x"}, "model": {"name": "x"}, "targets": {"a": {"shards": "x"}}}
    | {"solve": {"target_batch": 5}}
)
HEADS = Heads(torch.randn(8, 4, generator=G), torch.randn(6, 4, generator=G), 5.0)


def features(*shape) -> np.ndarray:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=G), dim=-1).half().numpy()


def make(**settings) -> Target:
    labels, prompts = np.arange(23, dtype=np.int32) % 3, features(3, 2, 6)
    asked = Settings.model_validate({"shards": "x"} | settings)
    return Target("a", asked, features(23, 8), features(23, 6), *([labels, prompts] if asked.kind.labelled else []))


KINDS = [
    {},
    {"calibrated": True},
    {"loss": "retrieval_margin", "margin": 0.3},
    {"loss": "zero_shot", "classes": "x"},
    {"loss": "zero_shot", "classes": "x", "calibrated": True},
]


@pytest.mark.parametrize("settings", KINDS)
def test_the_losses_of_refits_move_along_the_gradients_of_their_groups(settings):
    target, step = make(**settings), 1e-2
    for i, group in enumerate(groups(target, CONFIG)):
        along = gradient(HEADS, target, group, CONFIG)
        image, text = HEADS.split(along / along.norm() * step)
        ends = [Heads(HEADS.image + s * image, HEADS.text + s * text, 5.0) for s in (1, -1)]
        ahead, behind = (group_losses(heads, target, CONFIG)[i] for heads in ends)
        assert ((ahead - behind) / (2 * step)).item() == pytest.approx(along.norm().item(), rel=0.05)


def test_every_question_has_its_own_answer():
    asked = [make(**settings)._replace(images=IMAGES, texts=TEXTS) for settings in (*KINDS, {"loss": "retrieval_margin"})]
    directions = torch.stack([gradient(HEADS, target, target.batches(CONFIG), CONFIG) for target in asked])
    cosines = torch.nn.functional.normalize(directions, dim=1) @ torch.nn.functional.normalize(directions, dim=1).T
    assert (cosines - torch.eye(len(asked))).max() < 0.999


IMAGES, TEXTS = features(23, 8), features(23, 6)


def test_models_are_compared_at_their_best_temperature():
    target = make(loss="zero_shot", classes="x")
    warmer = HEADS._replace(logit_scale=10.0)
    assert target_loss(warmer, target, CONFIG) == pytest.approx(target_loss(HEADS, target, CONFIG), rel=0.05)
    assert group_losses(warmer, target, CONFIG).sum() > 1.2 * group_losses(HEADS, target, CONFIG).sum()


def test_a_target_with_nothing_left_to_improve_is_named():
    target = make(loss="retrieval_margin", margin=1e-6)
    right = target._replace(images=np.eye(6, 8, dtype=np.float16), texts=np.eye(6, dtype=np.float16))
    heads = Heads(torch.eye(8, 6), torch.eye(6), 5.0)
    with pytest.raises(RunError, match="target a: its loss retrieval_margin has no gradient"):
        gradient(heads, right, [torch.arange(6)], CONFIG)


def test_the_words_of_the_prompts_are_part_of_what_a_target_is(tmp_path, tiny_model):
    """Other words in the same files are another target: its features, and all that follows, are not those that are there."""
    (tmp_path / "one.tar").write_bytes(bytes(10240))
    place = {"shards": str(tmp_path / "one.tar")}
    asked = place | {"loss": "zero_shot"} | {name: str(tmp_path / name) for name in ("classes", "templates")}
    base = {"run": str(tmp_path), "corpus": place, "model": {"name": tiny_model}}
    config = Config.model_validate(base | {"targets": {"plain": place, "named": asked}})

    def load(classes: str, templates: str):
        (tmp_path / "classes").write_text(classes)
        (tmp_path / "templates").write_text(templates)
        targets = load_inputs(config).targets
        return targets["named"], targets["plain"].fingerprint

    first, plain = load("cat\ndog\n", "a {c}\nthe {}")
    assert first.prompts == [["a cat", "the cat"], ["a dog", "the dog"]]
    assert first.classes == ["a cat", "a dog"]
    same, another_class, another_template = (
        load("cat\ndog", "a {c}\nthe {}\n"),
        load("cat\nfox", "a {c}"),
        load("cat\ndog", "a {c}"),
    )
    assert same[0].fingerprint == first.fingerprint
    assert len({d[0].fingerprint for d in (same, another_class, another_template)} | {plain}) == 4
    assert {d[1] for d in (same, another_class, another_template)} == {plain}


def test_coverage_counts_distinct_captions():
    """Many copies of a caption are one thing that the corpus is about."""
    captions, target = features(40, 6), make()
    once = Sample(features(40, 8), captions, np.zeros(40, np.int16), [40])
    often = Sample(features(90, 8), np.concatenate([captions, captions[[3] * 50]]), np.zeros(90, np.int16), [90])
    assert 0 < coverage(HEADS, target, once, CONFIG) == coverage(HEADS, target, often, CONFIG) < 1


def test_two_halves_share_no_pair_and_are_the_whole_target():
    target = make()
    halves = [torch.cat(half) for half in target.halves(CONFIG)]
    assert sorted(torch.cat(halves).tolist()) == list(range(23))
    assert abs(len(halves[0]) - len(halves[1])) <= 1
    whole = gradient(HEADS, target, target.batches(CONFIG), CONFIG)
    parts = [gradient(HEADS, target, half, CONFIG) for half in target.halves(CONFIG)]
    assert torch.allclose(sum(parts), whole, atol=1e-4 * whole.norm())


@pytest.mark.parametrize("settings", KINDS)
def test_a_half_is_judged_by_its_own_pairs(settings):
    target = make(**settings)
    rows = torch.cat(target.halves(CONFIG)[0])
    own = target._replace(
        images=target.images[rows], texts=target.texts[rows], labels=None if target.labels is None else target.labels[rows]
    )
    assert target_loss(HEADS, target, CONFIG, rows) == pytest.approx(target_loss(HEADS, own, CONFIG), rel=1e-5)
