"""A target of a run asks what its settings say, and nothing to improve ends the run before the work."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from ecif.heads import Heads
from ecif.heads.cross_fit import FittedHeads
from ecif.sample import Sample
from ecif.targets import Contrastive, RetrievalMargin, ZeroShot
from ecif.targets.question import Question
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.inputs import load_inputs
from pipeline.run_folder.artifacts import Artifacts, names
from pipeline.stages.solve.stage import solve
from pipeline.stages.solve.targets import TargetFeatures
from pipeline.workers.cluster import Resources
from pipeline.workers.run import Run

G = torch.Generator().manual_seed(0)
HEADS = Heads(torch.randn(8, 4, generator=G), torch.randn(6, 4, generator=G), 5.0)


def features(*shape: int) -> np.ndarray:
    return normalize(torch.randn(*shape, generator=G), dim=-1).half().numpy()


TARGET = TargetFeatures("a", features(23, 8), features(23, 6), np.arange(23, dtype=np.int32) % 3, features(3, 2, 6))


def configure(**settings) -> Config:
    base = {"run": "run", "corpus": {"shards": "x"}, "model": {"name": "x"}, "solve": {"target_batch": 5}}
    return Config.model_validate(base | {"targets": {"a": {"shards": "x"} | settings}})


def ask(target: TargetFeatures = TARGET, **settings) -> Question:
    return target.question(configure(**settings))


KINDS = [
    ({}, Contrastive, {"calibrated": False}),
    ({"calibrated": True}, Contrastive, {"calibrated": True}),
    ({"loss": "retrieval_margin", "margin": 0.3}, RetrievalMargin, {"margin": 0.3}),
    ({"loss": "retrieval_margin"}, RetrievalMargin, {"margin": 0.2}),
    ({"loss": "zero_shot", "classes": "x"}, ZeroShot, {"calibrated": False}),
    ({"loss": "zero_shot", "classes": "x", "calibrated": True}, ZeroShot, {"calibrated": True}),
]


def test_several_captions_of_an_image_are_no_wrong_ones():
    image = np.arange(23) // 2
    for rows in ask(TARGET._replace(image=image)).batches:
        assert len(set(image[rows.numpy()])) == len(rows)


@pytest.mark.parametrize(("settings", "kind", "options"), KINDS)
def test_settings_say_what_is_asked(settings, kind, options):
    question = ask(**settings)
    assert type(question.loss) is kind
    assert {name: getattr(question.loss, name) for name in options} == options
    assert torch.equal(question.loss.images, torch.from_numpy(TARGET.images.astype(np.float32)))
    assert max(len(rows) for rows in question.batches) < 1.5 * 5


def test_every_question_has_its_own_answer():
    directions = normalize(torch.stack([ask(**settings).gradient(HEADS) for settings, _, _ in KINDS]), dim=1)
    assert (directions @ directions.T - torch.eye(len(KINDS))).max() < 0.999


def test_a_target_with_nothing_left_to_improve_ends_the_run_before_the_work(tmp_path):
    """Before an actor is asked for: there is no Ray here."""
    right = TargetFeatures("a", np.eye(6, 8, dtype=np.float16), np.eye(6, dtype=np.float16))
    config, heads = configure(loss="retrieval_margin", margin=1e-6), Heads(torch.eye(8, 6), torch.eye(6), 5.0)
    read = {"batches": "", "sample": "", "corpus": "", "target/a": "", "question/a": ""}
    run = Run(config, Resources(1, {}, {}), Artifacts(str(tmp_path), names(config, read), {}))
    sample = Sample(torch.rand(4, 8), torch.rand(4, 6), torch.arange(4) % 2, [4])
    with pytest.raises(RunError, match="target a: its loss retrieval_margin has no gradient"):
        solve(run, heads, FittedHeads([heads], [[heads], [heads]]), lambda: sample, [right])


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
