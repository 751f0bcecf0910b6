"""Projected gradients of every pair. The index stores them for questions that are asked after the run.

The derivative of a logit S_ij = s <u_i, v_j> with respect to the image head is s x_j (x) (u_i - c_ij v_j) / |z_j| with
c_ij = <u_i, v_j>. That with respect to the text head has the same form. A Kronecker pair projects the derivative to J_ij with
k = ki ko numbers for each head: features by A [d_x, ki], embeddings by C [d, ko]. Let a_j = A^T x_j / |z_j|, U = u C, V = v C,
`o` the elementwise product and (x) the row-wise outer product. Then two sums over a batch

    rows(M)_i = sum_j M_ij J_ij = s [(M a) (x) U - (M o c)(a (x) V)]              image head; the text head by symmetry
    cols(M)_j = sum_i M_ij J_ij = s [a (x) (M^T U - colsum(M o c) V)]

give the gradient of every Pos_n and Neg_n of the batch, without a backward pass and without a loop over pairs:

    grad Pos = rows(P - I) + cols(Q - I)
    grad Neg = cols(w) - w^T rows(P) + rows(w') - w' cols(Q)
               w = P / (1 - P), w' = Q / (1 - Q), 0 on the diagonal (exact);  w = P, w' = Q (the paper's Taylor step)

Sources: ECIF (arXiv 2411.11667) for Pos and Neg, LoGra (arXiv 2405.13954) for the Kronecker projection. A random projection
loses what is specific to one concept. Use `projection.pca_projection`, at the largest rank that storage allows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.heads import Embedded, Heads
from ecif.heads import logits as all_logits
from ecif.losses.contrastive import Negative, without_largest
from ecif.projected.projection import Factors, Projection


class HeadJacobian(NamedTuple):
    """J_ro, the projected derivative of a logit with respect to one head. The whole tensor is never formed.

    Index o is the item on the head's own side (an image for the image head). Index r is the item on the other side.
    """

    scaled: Tensor  # s a [B, ki]
    own: Tensor  # [B, ko] projected embeddings of the head's own side
    other: Tensor  # [B, ko] projected embeddings of the other side
    cosine: Tensor  # c [B, B], other side x own side
    outer: Tensor  # s a (x) own [B, k]

    def over_own(self, m: Tensor) -> Tensor:
        """sum_o M_ro J_ro: [B, B] to [B, k]."""
        return _outer(m @ self.scaled, self.other) - (m * self.cosine) @ self.outer

    def over_other(self, m: Tensor) -> Tensor:
        """sum_r M_ro J_ro: [B, B] to [B, k]."""
        return _outer(self.scaled, m.T @ self.other - (m * self.cosine).sum(0)[:, None] * self.own)

    def second_moment(self, m: Tensor) -> Tensor:
        """sum_ro M_ro J_ro J_ro^T: [B, B] to [k, k]."""
        (ki, ko), mc = (self.scaled.shape[1], self.own.shape[1]), m * self.cosine
        bent = _outer(mc.T @ self.other, self.own)
        inner = m.T @ _outer(self.other, self.other) + (mc * self.cosine).sum(0)[:, None] * _outer(self.own, self.own)
        inner = inner - bent - bent.unflatten(1, (ko, ko)).mT.flatten(1)  # [B, ko ko], one row for each o
        return (_outer(self.scaled, self.scaled).T @ inner).view(ki, ki, ko, ko).transpose(1, 2).reshape(ki * ko, ki * ko)

    def cross_moment(self, other: "HeadJacobian", m: Tensor) -> Tensor:
        """sum_ro M_ro J_ro J'_ro^T with J' the Jacobian of the other head: [B, B] to [k, k']."""
        mc = m * self.cosine
        swapped = _outer(self.scaled, other.other).T @ (m.T @ _outer(other.scaled, self.other))
        sizes = (self.scaled.shape[1], other.own.shape[1], other.scaled.shape[1], self.own.shape[1])
        straight = swapped.view(sizes).transpose(1, 3).reshape(self.outer.shape[1], other.outer.shape[1])
        left = _outer(mc @ self.scaled, self.other).T @ other.outer
        right = (mc * self.cosine).T @ other.outer - _outer(mc.T @ other.scaled, other.other)
        return straight - left + self.outer.T @ right

    def entries(self, r: Tensor, o: Tensor) -> Tensor:
        """J_ro at indices r [n] and o [n]: [n, k]."""
        return _outer(self.scaled[o], self.other[r] - self.cosine[r, o][:, None] * self.own[o])


@dataclass(frozen=True)
class ProjectedBatch:
    """One batch under a projection: its logits S and their projected derivatives J_ij [k], image head first."""

    logits: Tensor  # S [B, B], row = text, column = image
    image: HeadJacobian
    text: HeadJacobian

    def rows(self, m: Tensor) -> Tensor:
        """sum_j M_ij J_ij: [B, B] to [B, k]."""
        return torch.cat([self.image.over_own(m), self.text.over_other(m.T)], dim=1)

    def cols(self, m: Tensor) -> Tensor:
        """sum_i M_ij J_ij: [B, B] to [B, k]."""
        return torch.cat([self.image.over_other(m), self.text.over_own(m.T)], dim=1)

    def entries(self, i: Tensor, j: Tensor) -> Tensor:
        """J_ij at indices i [n] and j [n]: [n, k]."""
        return torch.cat([self.image.entries(i, j), self.text.entries(j, i)], dim=1)

    @cached_property
    def row_mean(self) -> Tensor:
        """rows(P) [B, k]."""
        return self.rows(self.logits.softmax(1))

    @cached_property
    def column_mean(self) -> Tensor:
        """cols(Q) [B, k]."""
        return self.cols(self.logits.softmax(0))


def project_batch(heads: Heads, batch: Embedded, projection: Projection) -> ProjectedBatch:
    """Project one batch. Its gradients and its curvature are computed from the result.

    Args:
        heads: the heads at which derivatives are taken.
        batch: the B pairs that share a softmax, embedded with these heads.
        projection: see `identity_projection`, `random_projection`, `pca_projection`.
    """
    logits = all_logits(heads, batch)
    cosine = batch.u @ batch.v.T
    projection = projection.to(batch.u)

    def head(factors: Factors, x: Tensor, norm: Tensor, own: Tensor, other: Tensor, cosine: Tensor) -> HeadJacobian:
        # An embedding without direction (see `heads.embed`) has no derivative: it is set to 0 instead of infinity.
        inverse = torch.where(norm > torch.finfo(norm.dtype).tiny, heads.logit_scale / norm, 0.0)
        scaled, own, other = x @ factors.features * inverse, own @ factors.embedding, other @ factors.embedding
        return HeadJacobian(scaled, own, other, cosine, _outer(scaled, own))

    return ProjectedBatch(
        logits,
        head(projection.image, batch.images, batch.image_norm, batch.v, batch.u, cosine),
        head(projection.text, batch.texts, batch.text_norm, batch.u, batch.v, cosine.T),
    )


def pair_gradients(batch: ProjectedBatch, kind: Negative = "exact") -> tuple[Tensor, Tensor]:
    """R grad Pos_n and R grad Neg_n of every pair of a batch.

    Args:
        batch: B pairs under a projection R.
        kind: exact negatives, or the paper's first-order (Taylor) form.

    Returns:
        (positive, negative), each [B, k], in loss units per parameter unit; dtype of the embeddings.
    """
    everyone = torch.arange(len(batch.logits), device=batch.logits.device)
    positive = batch.row_mean + batch.column_mean - 2 * batch.entries(everyone, everyone)
    negative = _removed_from_rows(batch.logits, batch.rows, batch.cols, batch.row_mean, kind)
    negative += _removed_from_rows(
        batch.logits.T, lambda m: batch.cols(m.T), lambda m: batch.rows(m.T), batch.column_mean, kind
    )
    return positive, negative


def _removed_from_rows(
    logits: Tensor, rows: Callable[[Tensor], Tensor], cols: Callable[[Tensor], Tensor], row_mean: Tensor, kind: Negative
) -> Tensor:
    """[B, k]: for each column, the gradient of what it adds to the log-sum-exp of the other pairs' rows."""
    p = logits.softmax(1)
    if kind == "taylor" or len(p) == 1:
        w = p - torch.diag(p.diagonal())
        return cols(w) - w.T @ row_mean
    # At the largest entry of a row, P/(1-P) (J_kn - mean) = P (J_kn - mean of the others). Only there may 1 - P underflow.
    top, _, others = without_largest(logits)
    w = (p / (1 - p).scatter(1, top, 1.0)).scatter(1, top, 0.0)
    at_top = torch.zeros_like(p).scatter(1, top, p.gather(1, top))
    w, at_top = w - torch.diag(w.diagonal()), at_top - torch.diag(at_top.diagonal())
    return cols(w + at_top) - w.T @ row_mean - at_top.T @ rows(others)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise outer product: [B, ki] and [B, ko] to [B, ki ko]."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)
