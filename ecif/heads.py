"""The two linear heads of a CLIP model on cached features, and their derivatives in closed form.

With z = x W and v = z / |z| for images, u alike for texts, the logits are S_ij = s <u_i, v_j>: row = text, column = image.
A direction in the space of both heads is one flat vector of length P = d_x d + d_t d, image head first.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """The final projections of both towers; everything before them is frozen."""

    image: Tensor  # [d_x, d]
    text: Tensor  # [d_t, d]
    logit_scale: float  # s, already exponentiated

    @property
    def size(self) -> int:
        """P, the number of parameters of both heads."""
        return self.image.numel() + self.text.numel()

    def to(self, device: torch.device | str) -> "Heads":
        """The same heads on another device."""
        return Heads(self.image.to(device), self.text.to(device), self.logit_scale)

    def split(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """A flat direction [P] as its image [d_x, d] and text [d_t, d] parts."""
        image, text = direction.split([self.image.numel(), self.text.numel()])
        return image.view_as(self.image), text.view_as(self.text)


class Embedded(NamedTuple):
    """Pairs seen through the heads: what every derivative below needs."""

    images: Tensor  # [N, d_x] features x
    texts: Tensor  # [N, d_t] features t
    v: Tensor  # [N, d] unit image embeddings
    u: Tensor  # [N, d] unit text embeddings
    image_norm: Tensor  # [N, 1] |x W_v|
    text_norm: Tensor  # [N, 1] |t W_t|

    def take(self, rows: Tensor) -> "Embedded":
        """The pairs at `rows`, without embedding them again."""
        return Embedded(*(part[rows] for part in self))


def standardised(heads: Heads) -> Heads:
    """The same model with each head scaled to Frobenius norm sqrt(d).

    Cosine heads are scale-invariant, so this changes no logit; it gives learning rate and damping one meaning for every
    checkpoint (a gradient with respect to W goes as 1 / |W|).
    """
    rescale = lambda w: w * (w.shape[1] ** 0.5 / w.norm())  # noqa: E731
    return Heads(rescale(heads.image), rescale(heads.text), heads.logit_scale)


def embed(heads: Heads, images: Tensor, texts: Tensor) -> Embedded:
    """Embed pairs of features.

    Args:
        heads: the two projections and the logit scale.
        images: [N, d_x] image features.
        texts: [N, d_t] text features; row i belongs to image i.

    Returns:
        Unit embeddings in the dtype of the features, and what their derivatives need.
    """
    z_image, z_text = images @ heads.image, texts @ heads.text
    # A feature that the head maps to zero has no direction: its embedding is zero, not NaN.
    tiny = torch.finfo(images.dtype).tiny
    image_norm = z_image.norm(dim=1, keepdim=True).clamp_min(tiny)
    text_norm = z_text.norm(dim=1, keepdim=True).clamp_min(tiny)
    return Embedded(images, texts, z_image / image_norm, z_text / text_norm, image_norm, text_norm)


def logits(heads: Heads, pairs: Embedded) -> Tensor:
    """S [N, N]: every text against every image."""
    return heads.logit_scale * pairs.u @ pairs.v.T


def tangents(heads: Heads, pairs: Embedded, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Change of the unit embeddings when the heads move along `direction` [P]: (u', v'), each [N, d]."""
    image, text = heads.split(direction)
    dz_image, dz_text = pairs.images @ image, pairs.texts @ text
    dv = (dz_image - pairs.v * (pairs.v * dz_image).sum(1, keepdim=True)) / pairs.image_norm
    du = (dz_text - pairs.u * (pairs.u * dz_text).sum(1, keepdim=True)) / pairs.text_norm
    return du, dv


def logits_jvp(heads: Heads, pairs: Embedded, du: Tensor, dv: Tensor) -> Tensor:
    """S' [N, N]: the change of the logits when the embeddings change by u', v'."""
    return heads.logit_scale * (du @ pairs.v.T + pairs.u @ dv.T)


def logits_vjp(heads: Heads, pairs: Embedded, cotangent: Tensor) -> Tensor:
    """Gradient [P] with respect to both heads of sum_ij cotangent_ij S_ij."""
    dv, du = heads.logit_scale * cotangent.T @ pairs.u, heads.logit_scale * cotangent @ pairs.v
    dz_image = (dv - pairs.v * (pairs.v * dv).sum(1, keepdim=True)) / pairs.image_norm
    dz_text = (du - pairs.u * (pairs.u * du).sum(1, keepdim=True)) / pairs.text_norm
    return torch.cat([(pairs.images.T @ dz_image).flatten(), (pairs.texts.T @ dz_text).flatten()])
