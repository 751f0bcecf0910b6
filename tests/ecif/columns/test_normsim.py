"""NormSim against its definition, image by image of the target."""

import math

import pytest
import torch

from ecif.columns import NormSim2, NormSimInf
from tests.support.problems import held_out_pairs


def test_they_are_the_norm_and_the_largest_of_the_cosines_with_the_targets_images(monkeypatch):
    monkeypatch.setattr("ecif.columns.normsim.CHUNK", 5)
    pairs = held_out_pairs()
    both = zip(NormSim2().values(pairs).tolist(), NormSimInf().values(pairs).tolist(), strict=True)
    for image, (norm, largest) in zip(pairs.images, both, strict=True):
        cosines = [torch.cosine_similarity(image, of_target, dim=0).item() for of_target in pairs.target_images]
        assert norm == pytest.approx(math.sqrt(sum(c**2 for c in cosines)))
        assert largest == pytest.approx(max(cosines))


@pytest.mark.parametrize("score", [NormSim2(), NormSimInf()])
def test_without_images_of_a_target_there_is_nothing_to_compare_with(score):
    with pytest.raises(ValueError, match="images of a target"):
        score.values(held_out_pairs()._replace(target_images=None))
