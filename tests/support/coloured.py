"""Pairs that a tiny CLIP learns within seconds: noisy images of one pattern for each class, whose caption is the class."""

from typing import Any

import torch

from ecif.training import Images, Recipe

TINY: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None, "head_width": 8},
    "text_cfg": {"context_length": 4, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
}
RECIPE = Recipe(steps=40, batch_size=32, learning_rate=3e-3)


def coloured(count: int, classes: int = 8, seed: int = 0) -> Images:
    """`count` pairs in turn of each class. Every seed has the same patterns."""
    random = torch.Generator().manual_seed(seed)
    patterns = torch.randint(0, 256, (classes, 3, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    label = torch.arange(count) % classes
    pixels = torch.nn.functional.interpolate(patterns[label], size=(32, 32))
    pixels = (pixels + 10 * torch.randn(pixels.shape, generator=random)).clamp(0, 255).to(torch.uint8)
    tokens = torch.zeros(count, 4, dtype=torch.int32)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = 48, label + 1, 49  # the last token has the largest number, as CLIP's has
    return Images(pixels, tokens)
