"""Trunks whose weights are kept in 16 bits."""

import copy

import pytest
import torch

from ecif import towers
from ecif.towers.precision import computed_in, keep_weights_in
from tests.ecif.towers.test_towers import CAPTIONS, VARIANTS, write_random

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_in_16_bits_give_the_features_of_autocast(tmp_path, variant):
    model = towers.load(write_random(tmp_path, variant))
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def features(model: towers.Towers) -> list[torch.Tensor]:
        return [model.image_features(pixels), model.text_features(CAPTIONS)]

    kept = copy.deepcopy(model)
    keep_weights_in("bf16", kept)
    products = [module for module in kept.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    assert products and {module.weight.dtype for module in products} == {torch.bfloat16}
    exact = features(model)
    with computed_in("bf16", CPU):
        rounded = [features(model), features(kept)]
    for truth, autocast, ours in zip(exact, *rounded, strict=True):
        assert not torch.equal(truth, ours)
        errors = [1 - torch.cosine_similarity(truth, found).min().item() for found in (autocast, ours)]
        assert errors[1] < max(3 * errors[0], 2e-4)


def test_in_fp32_no_weight_is_changed(tmp_path):
    model = towers.load(write_random(tmp_path, "ViT and transformer"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    keep_weights_in("fp32", model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
