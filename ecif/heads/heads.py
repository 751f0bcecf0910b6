"""The two linear heads of a CLIP model on cached features, and their derivatives in closed form.

The image embedding is v = z / |z| with z = x W; the text embedding u is made in the same way. The logits are
S_ij = s <u_i, v_j> + b: row = text, column = image. A direction in the space of the heads is one flat vector of length P: image
head d_x d, text head d_t d, then log s and b if they are parameters.

A head with a bias c has the same form: z = x W + c = [x, 1] [W; c]. Only the direction of z counts, so [x, 1] may be scaled to
length 1, as x is (`ecif.towers`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor, Tensor])
NULL = 1e-6  # a feature x with |x W| below this share of |x| |W| is in the null space of W


class Heads(NamedTuple):
    """The final projections of both towers. Everything before them is frozen."""

    image: Tensor  # [d_x, d]
    text: Tensor  # [d_t, d]
    logit_scale: float  # s, already exponentiated
    logit_bias: float = 0.0  # b, which SigLIP has; a softmax is invariant to it
    train_logit_scale: bool = False  # whether log s is a parameter
    train_logit_bias: bool = False  # whether b is a parameter

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return self.image.numel() + self.text.numel() + self.train_logit_scale + self.train_logit_bias

    def to(self, device: torch.device | str) -> "Heads":
        """The same heads on another device."""
        return self._replace(image=self.image.to(device), text=self.text.to(device))

    def split(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """A flat direction [..., P] as its image [..., d_x, d] and text [..., d_t, d] parts."""
        image, text, _ = direction.tensor_split([self.image.numel(), self.image.numel() + self.text.numel()], -1)
        return image.unflatten(-1, self.image.shape), text.unflatten(-1, self.text.shape)

    def split_scalars(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """The changes [...] of log s and of b in a flat direction [..., P]. A change is 0 if the scalar is not a parameter."""
        rest = direction[..., self.image.numel() + self.text.numel() :]
        zero = direction.new_zeros(direction.shape[:-1])
        return rest[..., 0] if self.train_logit_scale else zero, rest[..., -1] if self.train_logit_bias else zero

    def flat(self) -> Tensor:
        """A copy of the parameters as one flat vector [P]."""
        scalars = [math.log(self.logit_scale)] * self.train_logit_scale + [self.logit_bias] * self.train_logit_bias
        return torch.cat([self.image.flatten(), self.text.flatten(), self.image.new_tensor(scalars)])

    def at(self, point: Tensor) -> "Heads":
        """These heads with other parameters [P]. The projections are views of `point`."""
        image, text = self.split(point)
        log_scale, bias = self.split_scalars(point)
        scale = log_scale.exp().item() if self.train_logit_scale else self.logit_scale
        return self._replace(
            image=image, text=text, logit_scale=scale, logit_bias=bias.item() if self.train_logit_bias else self.logit_bias
        )


class Embedded(NamedTuple):
    """Pairs embedded with a set of heads, with everything that the derivatives below need."""

    images: Tensor  # [N, d_x] features x
    texts: Tensor  # [N, d_t] features t
    v: Tensor  # [N, d] unit image embeddings
    u: Tensor  # [N, d] unit text embeddings
    image_norm: Tensor  # [N, 1] |x W_v|; infinite for a feature that the head maps to zero
    text_norm: Tensor  # [N, 1] |t W_t|

    def take(self, rows: Tensor) -> "Embedded":
        """The pairs at `rows`, without embedding them again. With rows [n, B], a stack of batches."""
        return Embedded(*(part[rows] for part in self))

    def under(self, sets: int | list[int]) -> "Embedded":
        """The same pairs under one or some of several sets of heads, where embeddings are [S, N, d]."""
        if isinstance(sets, int):
            chosen: Any = sets
        else:
            following = sets == list(range(sets[0], sets[0] + len(sets)))
            chosen = slice(sets[0], sets[-1] + 1) if following else sets  # without a copy, if possible
        return Embedded(self.images, self.texts, *(part[chosen] for part in self[2:]))


def standardised(heads: Heads) -> Heads:
    """The same model with each head scaled to Frobenius norm sqrt(d), in single or double precision.

    Cosine heads are scale-invariant, so this changes no logit. But a gradient with respect to W is proportional to 1 / |W|:
    with standardised heads, learning rate and damping mean the same for every checkpoint.

    Raises:
        ValueError: a head is zero or not finite, or the logit scale is not a positive number. All similarities would be NaN.
    """

    def rescale(name: str, w: Tensor) -> Tensor:
        w = _single(w)
        if not (w.isfinite().all() and w.any()):
            raise ValueError(f"the {name} head is {'zero' if not w.any() else 'not finite'}: no pair has an embedding")
        return w * (w.shape[1] ** 0.5 / w.norm())

    if not (math.isfinite(heads.logit_scale) and heads.logit_scale > 0 and math.isfinite(heads.logit_bias)):
        raise ValueError(
            f"the logit scale is {heads.logit_scale:g} and the bias {heads.logit_bias:g}: not finite, or not above 0"
        )
    return heads._replace(image=rescale("image", heads.image), text=rescale("text", heads.text))


def embed(heads: Heads, images: Tensor, texts: Tensor) -> Embedded:
    """Embed pairs of features.

    Args:
        heads: the two projections.
        images: [N, d_x] image features.
        texts: [N, d_t] text features; row i belongs to image i.

    Returns:
        Unit embeddings, with features and norms for the derivatives: float64 for float64 features, else float32. Half precision
        would round a logit at scale 100 by 0.4, more than pairs differ by.
    """
    images, texts = _single(images), _single(texts)
    z_image, z_text = images @ _single(heads.image), texts @ _single(heads.text)
    image_norm, text_norm = _norm(images, heads.image, z_image), _norm(texts, heads.text, z_text)
    return Embedded(images, texts, z_image / image_norm, z_text / text_norm, image_norm, text_norm)


def _norm(features: Tensor, head: Tensor, z: Tensor) -> Tensor:
    """|z| [N, 1] of z = features W.

    A feature in the head's null space has no direction: z is zero but for rounding. With an infinite norm its embedding and all
    derivatives of it are zero.
    """
    norm = z.norm(dim=1, keepdim=True)
    rounding = NULL * features.norm(dim=1, keepdim=True) * head.norm()
    return norm.where(norm > rounding, torch.inf)


def _single(values: Tensor) -> Tensor:
    """Values in float32, or in float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def logits(heads: Heads, pairs: Embedded) -> Tensor:
    """S [N, N]: every text against every image. For a stack of batches, with embeddings [n, B, d], it is [n, B, B]."""
    return heads.logit_scale * pairs.u @ pairs.v.mT + heads.logit_bias


def tangents(heads: Heads, pairs: Embedded, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives (u', v', b') of each pair's embeddings and of the bias along `direction` [..., P].

    u' also holds the change of log s: scaling s changes s <u, v> as scaling u does.

    Returns:
        [..., N, d], [..., N, d] and [...]. Embeddings may have leading dimensions too, for several sets of heads.
    """
    image, text = heads.split(direction)
    log_scale, shift = heads.split_scalars(direction)
    dz_image, dz_text = pairs.images @ image, pairs.texts @ text
    dv = (dz_image - pairs.v * (pairs.v * dz_image).sum(-1, keepdim=True)) / pairs.image_norm
    du = (dz_text - pairs.u * (pairs.u * dz_text).sum(-1, keepdim=True)) / pairs.text_norm
    return du + log_scale[..., None, None] * pairs.u, dv, shift


def logits_jvp(heads: Heads, pairs: Embedded, du: Tensor, dv: Tensor, shift: Tensor) -> Tensor:
    """S' [N, N]: the derivative of the logits, from the derivatives that `tangents` gives.

    Embeddings and derivatives may have leading dimensions, for stacks of batches and for directions.
    """
    return heads.logit_scale * (du @ pairs.v.mT + pairs.u @ dv.mT) + shift


def logits_vjp(heads: Heads, pairs: Embedded, cotangent: Tensor) -> Tensor:
    """Gradient [P] with respect to the heads of sum_ij cotangent_ij S_ij."""
    dv, du = heads.logit_scale * cotangent.T @ pairs.u, heads.logit_scale * cotangent @ pairs.v
    return tangents_vjp(heads, pairs, du, dv, cotangent.sum())


def tangents_vjp(heads: Heads, pairs: Embedded, du: Tensor, dv: Tensor, shift: Tensor) -> Tensor:
    """Gradient [..., P] with respect to the heads of <du, u> + <dv, v> + shift b: the transpose of `tangents`."""
    dz_image = (dv - pairs.v * (pairs.v * dv).sum(-1, keepdim=True)) / pairs.image_norm
    dz_text = (du - pairs.u * (pairs.u * du).sum(-1, keepdim=True)) / pairs.text_norm
    parts = [(pairs.images.T @ dz_image).flatten(-2), (pairs.texts.T @ dz_text).flatten(-2)]
    parts += [(du * pairs.u).sum((-2, -1))[..., None]] * heads.train_logit_scale + [shift[..., None]] * heads.train_logit_bias
    return torch.cat(parts, -1)


def along_each(function: Callable[..., Result], heads: Heads, pairs: Embedded, *of_directions: Tensor) -> Result:
    """`tangents` or `tangents_vjp` for n directions: on a GPU together, on a CPU one after the other, as its caches are small.

    Args:
        function: one of the two.
        heads: the heads.
        pairs: under these heads.
        of_directions: further arguments, each with a leading dimension n, as the result has.
    """
    if pairs.u.device.type != "cpu":
        return function(heads, pairs, *of_directions)
    each = [function(heads, pairs, *of_one) for of_one in zip(*of_directions, strict=True)]
    return torch.stack(each) if isinstance(each[0], Tensor) else tuple(map(torch.stack, zip(*each, strict=True)))  # type: ignore[return-value]
