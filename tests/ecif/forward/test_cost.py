"""What forward mode costs, in forward passes."""

import time

import pytest
import torch
from open_clip.model import CLIP
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ecif.forward.mode import choose_parameters, clip_logits, flatten, gauss_newton_product, loss_gradient, scores


def medium_clip():
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": 4, "width": 256, "patch_size": 8, "head_width": 64}
    text = {"context_length": 32, "vocab_size": 4000, "width": 192, "heads": 3, "layers": 4}
    model = CLIP(embed_dim=128, vision_cfg=vision, text_cfg=text)
    return model, (torch.randn(24, 3, 64, 64), torch.randint(1, 3999, (24, 32)))


LAST = ["visual.transformer.resblocks.3.*", "transformer.resblocks.3.*"]


def test_a_target_costs_three_forward_passes_of_multiply_adds_and_less_for_the_last_blocks():
    model, batch = medium_clip()
    function = clip_logits(model)

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    def cost(patterns, targets):
        parameters = choose_parameters(model, patterns)
        directions = torch.randn(targets, flatten(parameters).numel())
        return flops(lambda: scores(function, parameters, batch, directions)) / targets

    with sdpa_kernel(SDPBackend.MATH):  # and gradients on: PyTorch does not count fused attention
        forward = flops(lambda: function({}, batch))
    assert cost(["*"], 1) == cost(["*"], 2) < 3.1 * forward
    assert cost(LAST, 1) < 1.6 * forward


@pytest.mark.slow
def test_measured_cost_in_forward_passes(capsys):
    model, batch = medium_clip()
    function = clip_logits(model)

    def seconds(call):
        times = []
        for _ in range(8):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return sorted(times[1:])[3]

    with torch.no_grad():
        forward = seconds(lambda: function({}, batch))
    for name, patterns in {"everything": ["*"], "last blocks": LAST}.items():
        parameters = choose_parameters(model, patterns)
        direction = 0.01 * torch.randn(1, flatten(parameters).numel())
        score = seconds(lambda p=parameters, d=direction: scores(function, p, batch, d)) / forward
        gradient = seconds(lambda p=parameters: loss_gradient(function, p, [batch])) / forward
        curved = seconds(lambda p=parameters, d=direction: gauss_newton_product(function, p, [batch], d)) / forward
        with capsys.disabled():
            print(f"\n{name}, in forward passes: score {score:.1f}, gradient {gradient:.1f}, product {curved:.1f}")
        assert score < 5
