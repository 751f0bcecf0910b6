"""The models that are trained whole: open_clip's own CLIP, from a dictionary."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# A residual network of four blocks, and a text transformer of two. 220 steps of 128 pairs take about 70 s on one core.
SMALL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 32, "image_size": 32, "patch_size": None},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}


def build(architecture: Mapping[str, Any], seed: int, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A CLIP of open_clip in float32, in training mode.

    Args:
        architecture: `embed_dim`, `vision_cfg`, `text_cfg` and the like, as in open_clip's files of models.
        seed: of the random weights.
        weights: a state dict to start from instead, for fine-tuning.
    """
    from open_clip.model import CLIP  # takes seconds, which processes that train nothing are spared

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = CLIP(**architecture)
    if weights is not None:
        model.load_state_dict(dict(weights))
    model.visual.to(memory_format=torch.channels_last)  # convolutions are a tenth faster so
    return model.train()
