"""The index: every pair's gradient in few numbers and the curvature among them, for questions not asked yet.

The derivative of a logit S_ij = s <u_i, v_j> with respect to the image head is s x_j (x) (u_i - c_ij v_j) / |z_j| with
c_ij = <u_i, v_j>, and alike for the text head. A Kronecker pair, features with A [d_x, ki] and embeddings with C [d, ko], takes
it to k = ki ko numbers a head, J_ij. With a_j = A^T x_j / |z_j|, U = u C, V = v C, `o` elementwise and (x) the row-wise outer
product, two sums over a batch

    rows(M)_i = sum_j M_ij J_ij = s [(M a) (x) U - (M o c)(a (x) V)]              image head; the text head by symmetry
    cols(M)_j = sum_i M_ij J_ij = s [a (x) (M^T U - colsum(M o c) V)]

give the gradient of every Pos_n and Neg_n of the batch, without a backward pass and without a loop over pairs:

    grad Pos = rows(P - I) + cols(Q - I)
    grad Neg = cols(w) - w^T rows(P) + rows(w') - w' cols(Q)
               w = P / (1 - P), w' = Q / (1 - Q), 0 on the diagonal (exact);  w = P, w' = Q (the paper's Taylor step)

Sources: ECIF (arXiv 2411.11667) for what is differentiated, LoGra (arXiv 2405.13954) for the Kronecker projection. The
curvature is the Gauss-Newton matrix, not LoGra's empirical Fisher. Random projection drowns what is specific to one concept:
`projection.pca_projection` is the one to use, at the largest rank that storage allows.
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
from ecif.projected.projection import Factors, Projection, random_bytes

FRACTION_BITS = 24  # 6e-8 a unit, 2.7e11 at most: standardised heads on unit features reach that after some 1e10 pairs
_LIMIT = 2**62  # two sums below it never overflow int64


class HeadJacobian(NamedTuple):
    """J_ro, the projected derivative of the logit of o (the head's own side) and r (the other side), never formed whole."""

    scaled: Tensor  # s a [B, ki]
    own: Tensor  # [B, ko] projected embeddings of the head's own side
    other: Tensor  # [B, ko] of the other side
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
        inner = inner - bent - bent.unflatten(1, (ko, ko)).mT.flatten(1)  # of each o, [B, ko ko]
        return (_outer(self.scaled, self.scaled).T @ inner).view(ki, ki, ko, ko).transpose(1, 2).reshape(ki * ko, ki * ko)

    def entries(self, r: Tensor, o: Tensor) -> Tensor:
        """J_ro at indices r [n] and o [n]: [n, k]."""
        return _outer(self.scaled[o], self.other[r] - self.cosine[r, o][:, None] * self.own[o])


@dataclass(frozen=True)
class ProjectedBatch:
    """One batch seen through a projection: its logits S and their derivatives J_ij [k], image head first."""

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
    """What gradients and curvature of one batch are computed from.

    Args:
        heads: where derivatives are taken.
        batch: the B pairs that share a softmax, embedded with these heads.
        projection: see `identity_projection`, `random_projection`, `pca_projection`.
    """
    logits = all_logits(heads, batch)
    cosine = batch.u @ batch.v.T
    projection = projection.to(batch.u)

    def head(factors: Factors, x: Tensor, norm: Tensor, own: Tensor, other: Tensor, cosine: Tensor) -> HeadJacobian:
        # An embedding without direction (see `heads.embed`) has no derivative: 0, not infinity.
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
        batch: of B pairs.
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


def gauss_newton(batch: ProjectedBatch) -> Tensor:
    """R J^T (d2L/dS2) J R^T of one batch, exactly, at cost 13 B (k/2)^2 + 2 B^2 (ko^2 + k) for two heads of k/2 numbers each.

    sum_ij (P + Q)_ij J_ij J_ij^T - rows(P)^T rows(P) - cols(Q)^T cols(Q): with the Kronecker form of J, the first term is a few
    matrix products. No logit is visited alone.

    Returns:
        [k, k], symmetric up to rounding, loss units per squared parameter unit.
    """
    weight = batch.logits.softmax(1) + batch.logits.softmax(0)
    cross = _cross_moment(batch.image, batch.text, weight)
    upper = torch.cat([batch.image.second_moment(weight), cross], dim=1)
    lower = torch.cat([cross.T, batch.text.second_moment(weight.T)], dim=1)
    means = torch.cat([batch.row_mean, batch.column_mean])
    return torch.cat([upper, lower]) - means.T @ means


def sampled_gauss_newton(batch: ProjectedBatch, key: str, draws: int = 1) -> Tensor:
    """An unbiased estimate of `gauss_newton` at cost B k^2 a draw: the outer products of pseudo-gradients.

    Every row draws a label j ~ P_i. and adds (J_ij - mean_i)(J_ij - mean_i)^T, every column a label i ~ Q_.j alike: on average
    over the labels that is J^T (diag p - p p^T) J (Martens, arXiv 1412.1193).

    Args:
        batch: of B pairs.
        key: seeds the draw; give each batch its own, such as its shard and number in it.
        draws: labels per row and column, averaged.

    Returns:
        [k, k], symmetric up to rounding, loss units per squared parameter unit.
    """
    everyone = torch.arange(len(batch.logits), device=batch.logits.device).repeat(draws)
    image = _draw_labels(batch.logits.softmax(1), f"{key} rows", draws)
    text = _draw_labels(batch.logits.softmax(0).T, f"{key} columns", draws)
    rows = batch.entries(everyone, image) - batch.row_mean.repeat(draws, 1)
    columns = batch.entries(text, everyone) - batch.column_mean.repeat(draws, 1)
    pseudo_gradients = torch.cat([rows, columns])
    return pseudo_gradients.T @ (pseudo_gradients / draws)


class CurvatureSum(NamedTuple):
    """A sum of curvatures in fixed point: int64 multiples of 2^-fraction_bits.

    Integer addition is associative: sums merged in any order or tree have the same bytes. Each part is rounded once, by
    2^-(fraction_bits + 1) at most. Entries stay below 2^62 units: any two add up within int64, and the sum can be checked.
    """

    units: Tensor  # int64 [k, k]
    fraction_bits: int = FRACTION_BITS
    pairs: int = 0  # how many it was summed over

    @staticmethod
    def of(matrix: Tensor, pairs: int, fraction_bits: int = FRACTION_BITS) -> "CurvatureSum":
        """The smallest part that is merged, of `pairs` pairs: the curvature [k, k] of a batch, or of several in a fixed order.

        Raises:
            ValueError: it is not finite, or too large for fixed point.
        """
        half = matrix.double() * 2.0 ** (fraction_bits - 1)
        units = (half + half.T).round_()  # exactly symmetric, which a matrix product need not be
        if not _fits(units):
            raise ValueError(f"a curvature of {pairs} pairs is not finite or above 2^{62 - fraction_bits}: {_TOO_LARGE}")
        return CurvatureSum(units.long(), fraction_bits, pairs)

    def merge(self, other: "CurvatureSum") -> "CurvatureSum":
        """The sum of both.

        Raises:
            ValueError: they differ in size or `fraction_bits`, or their sum does not fit.
        """
        if self.fraction_bits != other.fraction_bits or self.units.shape != other.units.shape:
            raise ValueError(
                f"curvatures of {tuple(self.units.shape)} at {self.fraction_bits} bits and {tuple(other.units.shape)} at "
                f"{other.fraction_bits} bits do not add up: index both parts with the same projection and fraction_bits"
            )
        units, pairs = self.units + other.units, self.pairs + other.pairs
        if not _fits(units):
            raise ValueError(f"the curvature of {pairs} pairs is above 2^{62 - self.fraction_bits}: {_TOO_LARGE}")
        return CurvatureSum(units, self.fraction_bits, pairs)

    def matrix(self) -> Tensor:
        """[k, k] float64, loss units per squared parameter unit."""
        return self.units.double() * 2.0**-self.fraction_bits


_TOO_LARGE = "use unit features and standardised heads, or fewer fraction_bits"


class DampedCurvature(NamedTuple):
    """H + damping I, factorised: what answers for pairs and queries."""

    cholesky: Tensor  # [k, k] lower, float64

    def solve(self, gradients: Tensor) -> Tensor:
        """H^-1 g of gradients [n, k]: [n, k] float64, the parameter change (projected) when the pair is removed."""
        return torch.cholesky_solve(gradients.to(self.cholesky).T, self.cholesky).T

    def influence(self, gradients: Tensor, queries: Tensor) -> Tensor:
        """Predicted change of each query's loss if the pair is removed.

        Args:
            gradients: [N, k] of the pairs: positive, negative or their sum.
            queries: [T, k], `Projection.apply` of the gradients of the queries' losses.

        Returns:
            [T, N] float64, in loss units of the queries. Above 0 the pair helps.
        """
        return self.solve(queries) @ gradients.to(self.cholesky).T

    def self_influence(self, gradients: Tensor) -> Tensor:
        """g^T H^-1 g [N] >= 0 of gradients [N, k], positive and negative parts summed: how far the pair is memorised."""
        whitened = torch.linalg.solve_triangular(self.cholesky, gradients.to(self.cholesky).T, upper=False)
        return whitened.square().sum(0)


def damped(curvature: Tensor, damping: float) -> DampedCurvature:
    """Factorise H + damping I.

    Args:
        curvature: H [k, k], symmetric.
        damping: added to the diagonal, in the units of H.

    Raises:
        ValueError: H + damping I is not positive definite, or damping is negative.
    """
    if not damping >= 0:
        raise ValueError(f"damping is {damping:g}: it cannot be below 0")
    h = curvature.double()
    factor, failed = torch.linalg.cholesky_ex(h + damping * torch.eye(len(h), dtype=h.dtype, device=h.device))
    if failed.item() or not bool(factor.isfinite().all()):
        raise ValueError(
            f"the projected curvature with damping {damping:g} is not positive definite: raise the damping "
            f"(the mean of the curvature's diagonal is {h.diagonal().mean().item():g}) or sum the curvature over more pairs"
        )
    return DampedCurvature(factor)


def _cross_moment(image: HeadJacobian, text: HeadJacobian, m: Tensor) -> Tensor:
    """sum_ij M_ij J_ij J'_ij^T, J of the image head, J' of the text head: [B, B] to [k, k']."""
    mc = m * image.cosine
    swapped = _outer(image.scaled, text.other).T @ (m.T @ _outer(text.scaled, image.other))
    sizes = (image.scaled.shape[1], text.own.shape[1], text.scaled.shape[1], image.own.shape[1])
    straight = swapped.view(sizes).transpose(1, 3).reshape(image.outer.shape[1], text.outer.shape[1])
    left = _outer(mc @ image.scaled, image.other).T @ text.outer
    right = (mc * image.cosine).T @ text.outer - _outer(mc.T @ text.scaled, text.other)
    return straight - left + image.outer.T @ right


def _removed_from_rows(
    logits: Tensor, rows: Callable[[Tensor], Tensor], cols: Callable[[Tensor], Tensor], row_mean: Tensor, kind: Negative
) -> Tensor:
    """[B, k] gradients of what each column adds to the log-sum-exp of the other pairs' rows."""
    p = logits.softmax(1)
    if kind == "taylor" or len(p) == 1:
        w = p - torch.diag(p.diagonal())
        return cols(w) - w.T @ row_mean
    # At the largest entry of a row P/(1-P) (J_kn - mean) = P (J_kn - mean of the others): 1 - P may underflow there only.
    top, _, others = without_largest(logits)
    w = (p / (1 - p).scatter(1, top, 1.0)).scatter(1, top, 0.0)
    at_top = torch.zeros_like(p).scatter(1, top, p.gather(1, top))
    w, at_top = w - torch.diag(w.diagonal()), at_top - torch.diag(at_top.diagonal())
    return cols(w + at_top) - w.T @ row_mean - at_top.T @ rows(others)


def _fits(units: Tensor) -> bool:
    least, most = units.aminmax()
    return least.item() > -_LIMIT and most.item() < _LIMIT  # False for NaN


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise outer product: [B, ki] and [B, ko] to [B, ki ko]."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)


def _draw_labels(p: Tensor, key: str, draws: int) -> Tensor:
    """[draws * B] columns, drawn from each row of p [B, B] by inversion; draws are the outer dimension."""
    octets = random_bytes(key, 7 * draws * len(p)).long().view(draws, len(p), 7)
    bits = (octets << torch.arange(0, 56, 8)).sum(2) >> 3
    uniform = (bits.double() * 2.0**-53).to(p.device)  # [draws, B] in [0, 1)
    cumulative = p.double().cumsum(1)
    below = cumulative <= (uniform * cumulative[:, -1])[..., None]
    return below.sum(2).clamp_max(p.shape[1] - 1).flatten()
