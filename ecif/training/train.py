"""Train every parameter of a CLIP model with its own loss."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ecif.training.augment import augmented, normalised
from ecif.training.draws import batches

MAX_SCALE = 100.0  # of the logits, as CLIP clamps it


class Images(NamedTuple):
    """N pairs, ready for a model."""

    pixels: Tensor  # [N, 3, S, S] uint8
    tokens: Tensor  # [N, L] int, the captions

    def unit(self, rows: Tensor, device: torch.device) -> Tensor:
        """[B, 3, S, S] the images at `rows` from 0 to 1, on a device."""
        return self.pixels[rows].to(device).float() / 255


class Recipe(NamedTuple):
    """How a model is trained: AdamW with a linear warm-up and a cosine decay. Every rule gets the same number of steps."""

    steps: int = 220
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.1  # of matrices; gains, biases and the logit scale have none
    warmup: float = 0.1  # share of the steps
    crop: float = 0.5  # see `augment.augmented`
    jitter: float = 0.3


def train(model: Any, pairs: Images, counts: Tensor, recipe: Recipe, seed: int) -> list[float]:
    """Train a model in place, on the device that it is on. On CUDA the towers compute in bfloat16.

    Args:
        model: as `build` makes it.
        pairs: the corpus.
        counts: [N] int, how often a pair is drawn in an epoch. 0 leaves it out.
        recipe: how.
        seed: of the order of the pairs and of the augmentation.

    Returns:
        The loss of every step in nats: that of open_clip's ClipLoss.

    Raises:
        ValueError: no pair has a count.
    """
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    losses = []
    for step, rows in enumerate(batches(counts, recipe.batch_size, recipe.steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        images = normalised(augmented(pairs.unit(rows, device), recipe.crop, recipe.jitter, random))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            v, u, scale = model(images, pairs.tokens[rows].to(device).long())
        similarity = scale * u.float() @ v.float().T
        own = torch.arange(len(rows), device=device)
        loss = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(MAX_SCALE))
        losses.append(loss.item())
    return losses


def _groups(model: Any, weight_decay: float) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _schedule(step: int, recipe: Recipe) -> float:
    """The learning rate of a step, as a share of the highest."""
    rising = round(recipe.warmup * recipe.steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(recipe.steps - rising, 1)))
