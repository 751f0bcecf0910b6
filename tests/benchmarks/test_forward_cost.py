"""What forward mode costs beside one forward pass of the same pairs: ratios, measured in one run on one thread.

make bench
"""

import open_clip
import pytest
import torch
from open_clip.model import CLIP

from ecif.forward.mode import choose_parameters, clip_logits, flatten, gauss_newton_product, loss_gradient, scores
from tests.benchmarks.support.timing import seconds

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("one_thread")]
CHUNK = 32  # as the pipeline has it
VISION = {"image_size": 32, "layers": 4, "width": 128, "patch_size": 8, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 4000, "width": 128, "heads": 4, "layers": 4}
CHOICES = {
    "everything": ["*"],
    "last blocks": ["visual.transformer.resblocks.3.*", "transformer.resblocks.3.*"],
    "projections": ["visual.proj", "text_projection"],
}


@pytest.mark.parametrize("pairs", [32, 128, 256])
def test_a_target_costs_a_few_forward_passes(pairs):
    torch.manual_seed(0)
    model = CLIP(embed_dim=64, vision_cfg=VISION, text_cfg=TEXT).eval()
    batch = torch.randn(pairs, 3, 32, 32), torch.randint(1, 3999, (pairs, 16))
    logits = clip_logits(model, CHUNK)
    with torch.inference_mode():
        forward = seconds(lambda: [logits.embed({}, piece) for piece in logits.chunks(batch)])
    print(f"\nbatch {pairs}, {1e3 * forward / pairs:.2f} ms a pair forward; in forward passes, a target:")
    for name, patterns in CHOICES.items():
        parameters = choose_parameters(model, patterns)
        direction = 0.01 * torch.randn(1, flatten(parameters).numel())
        score = seconds(lambda p=parameters, d=direction: scores(logits, p, batch, d)) / forward
        gradient = seconds(lambda p=parameters: loss_gradient(logits, p, [batch])) / forward
        product = seconds(lambda p=parameters, d=direction: gauss_newton_product(logits, p, [batch], d)) / forward
        print(f"  {name}: score {score:.1f}, gradient {gradient:.1f}, product {product:.1f}")
        assert score < 5


def test_score_beside_vit_b_32():
    model = open_clip.create_model("ViT-B-32").eval()
    batch = torch.randn(8, 3, 224, 224), open_clip.get_tokenizer("ViT-B-32")(["a photo"] * 8)
    logits = clip_logits(model, CHUNK)
    with torch.inference_mode():
        forward = seconds(lambda: logits.embed({}, batch))
    print(f"\nViT-B/32, batch 8, {1e3 * forward / 8:.0f} ms a pair forward; in forward passes, a target:")
    for name, patterns in {"everything": ["*"], "last blocks": ["*resblocks.11.*"]}.items():
        parameters = choose_parameters(model, patterns)
        direction = 0.01 * torch.randn(1, flatten(parameters).numel())
        score = seconds(lambda p=parameters, d=direction: scores(logits, p, batch, d)) / forward
        print(f"  {name}: score {score:.1f}")
        assert score < 5
