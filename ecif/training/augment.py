"""Augmentation of a batch of images: a random crop, resized to the full size, and jitter of the colours.

Images are not flipped, because a caption may name a side.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the red, green and blue of OpenAI's data, open_clip's default
STD = (0.26862954, 0.26130258, 0.27577711)
ASPECT = (3 / 4, 4 / 3)  # of a crop, as torchvision's RandomResizedCrop


def augmented(images: Tensor, crop: float, jitter: float, random: torch.Generator) -> Tensor:
    """A random view of every image, not yet normalised.

    Args:
        images: [B, 3, S, S] 0 to 1, on any device.
        crop: the least share of an image's area that a crop has, above 0 and at most 1.
        jitter: brightness, contrast and saturation are multiplied by factors of up to 1 +- jitter.
        random: on the CPU, so that every device sees the same views.

    Returns:
        [B, 3, S, S] 0 to 1.
    """
    chosen = torch.rand(len(images), 7, generator=random)
    area = crop + (1 - crop) * chosen[:, 0]
    low, high = (torch.tensor(ratio).log() for ratio in ASPECT)
    aspect = (low + (high - low) * chosen[:, 1]).exp()
    scale = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).clamp(max=1)  # width and height, as shares
    centre = (1 - scale) * (2 * chosen[:, 2:4] - 1)
    placed = torch.cat([torch.diag_embed(scale), centre[..., None]], 2).to(images)  # [B, 2, 3], an affine map of coordinates
    grid = F.affine_grid(placed, list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    brightness, contrast, saturation = (1 + jitter * (2 * chosen[:, 4:] - 1)).to(images).T[..., None, None, None]
    views = views * brightness
    mean = views.mean((1, 2, 3), keepdim=True)
    views = mean + contrast * (views - mean)
    grey = views.mean(1, keepdim=True)
    return (grey + saturation * (views - grey)).clamp(0, 1)


def normalised(images: Tensor) -> Tensor:
    """Images [B, 3, S, S] from 0 to 1, as the model takes them."""
    mean, std = (images.new_tensor(of)[:, None, None] for of in (MEAN, STD))
    return (images - mean) / std
