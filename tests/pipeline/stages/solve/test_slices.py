"""The sample on actors gives the numbers of the sample in one process, to the bit, whoever is lost."""

import pytest
import ray
import torch

from ecif.columns.bank import build_bank
from ecif.heads import standardised
from ecif.heads.cross_fit import FittedHeads
from ecif.losses import CLIP
from ecif.sample import Sample
from ecif.slices import LinearSystem, Shared
from ecif.system import LocalSystem
from pipeline.stages.solve.slices import SampleActors
from pipeline.workers.progress import Stage
from tests.support.problems import random_features, random_heads

PAIRS, FOLDS = 96, 3
HEADS = [standardised(random_heads(seed))._replace(logit_scale=20.0) for seed in range(1 + FOLDS)]
HEADS = [heads._replace(image=heads.image.float(), text=heads.text.float()) for heads in HEADS]
FITTED = FittedHeads(HEADS[:1], [[heads] for heads in HEADS[1:]])
IMAGES, TEXTS = (side.half() for side in random_features(PAIRS))
FOLD = (torch.arange(PAIRS) % FOLDS).short()
BANK = build_bank(IMAGES.float(), TEXTS.float(), FOLD, HEADS[0])
SHARED = Shared(Sample(IMAGES, TEXTS, FOLD, [12] * 8), FITTED.every(), HEADS[0], CLIP, BANK)
SYSTEMS = [LinearSystem(1 + f, f) for f in range(FOLDS)]
GRADIENTS = torch.randn(FOLDS, HEADS[0].size, generator=torch.Generator().manual_seed(2))
STEPS, DAMPING = 5, torch.tensor([0.5, 1.0, 2.0])


@pytest.fixture
def actors(local_ray):
    torch.set_num_threads(1)
    with Stage("solve", 1) as progress, SampleActors(SHARED, FITTED, 1, local_ray._replace(workers=2), progress) as system:
        assert len(system.actors) == 2
        yield system


@pytest.mark.parametrize("lost", ["none", "one before", "the first one after", "one for another question"])
def test_spaces_are_those_of_one_process(actors, lost):
    truth = LocalSystem(FITTED, SHARED, 1).krylov(SYSTEMS, GRADIENTS, STEPS)
    if lost == "one before":
        ray.kill(actors.actors[1])
    found = actors.krylov(SYSTEMS, GRADIENTS, STEPS)
    if lost == "the first one after":
        ray.kill(actors.actors[0])
    if lost == "one for another question":
        ray.kill(actors.actors[1])
        assert actors.influence(0, GRADIENTS[:1]).isfinite().all()
    assert torch.equal(found.largest_eigenvalue(), truth.largest_eigenvalue())
    for damping in (DAMPING, 10 * DAMPING):
        for ours, theirs in zip(found.solve(damping), truth.solve(damping), strict=True):
            assert torch.equal(ours, theirs)
    assert actors.replaced == (lost != "none")


def test_a_gradient_of_zero_is_the_callers_error(actors):
    with pytest.raises(ValueError, match="is zero or not finite"):
        actors.krylov(SYSTEMS, 0 * GRADIENTS, STEPS)


@pytest.mark.parametrize("plant", [False, True])
def test_agreement_with_a_target_is_that_of_one_process(actors, plant):
    truth = LocalSystem(FITTED, SHARED, 1).agreement(BANK, [-1, 0], plant)
    assert truth.shape == (2, PAIRS)
    assert torch.equal(actors.agreement(BANK, [-1, 0], plant), truth)
