"""The curvature of projected parameters: the Gauss-Newton matrix of a batch, its sum over a corpus, and solving with it.

It is the Gauss-Newton matrix J^T (d2L/dS2) J of the contrastive loss. It is not the empirical Fisher matrix that LoGra uses
(arXiv 2405.13954), which ignores that the logits of a batch share their softmaxes. `ecif.projected.sampled` has a cheaper
estimate of it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.projected.gradients import ProjectedBatch

FRACTION_BITS = 24  # a unit is 6e-8; standardised heads on unit features reach the largest sum, 2.7e11, after about 1e10 pairs
_LIMIT = 2**62  # two numbers below it have a sum that fits into int64
_TOO_LARGE = "use unit features and standardised heads, or fewer fraction_bits"


def gauss_newton(batch: ProjectedBatch) -> Tensor:
    """R J^T (d2L/dS2) J R^T of one batch, exactly, at cost 13 B (k/2)^2 + 2 B^2 (ko^2 + k) for two heads of k/2 numbers each.

    It is sum_ij (P + Q)_ij J_ij J_ij^T - rows(P)^T rows(P) - cols(Q)^T cols(Q). With the Kronecker form of J, the first term is
    a few matrix products, without a loop over logits.

    Returns:
        [k, k], symmetric up to rounding, loss units per squared parameter unit.
    """
    weight = batch.logits.softmax(1) + batch.logits.softmax(0)
    cross = batch.image.cross_moment(batch.text, weight)
    upper = torch.cat([batch.image.second_moment(weight), cross], dim=1)
    lower = torch.cat([cross.T, batch.text.second_moment(weight.T)], dim=1)
    means = torch.cat([batch.row_mean, batch.column_mean])
    return torch.cat([upper, lower]) - means.T @ means


class CurvatureSum(NamedTuple):
    """A sum of curvatures in fixed point: int64 multiples of 2^-fraction_bits.

    Integer addition is associative, so merging parts in any order gives the same bytes. Each part is rounded once, by at most
    2^-(fraction_bits + 1). Entries stay below 2^62 units, so that the sum of two fits into int64 and can be checked.
    """

    units: Tensor  # int64 [k, k]
    fraction_bits: int = FRACTION_BITS
    pairs: int = 0  # number of pairs that were summed

    @staticmethod
    def of(matrix: Tensor, pairs: int, fraction_bits: int = FRACTION_BITS) -> "CurvatureSum":
        """One part of the sum.

        Args:
            matrix: [k, k], the curvature of a batch, or of several batches that were added in a fixed order.
            pairs: number of pairs in them.
            fraction_bits: binary digits after the point.

        Raises:
            ValueError: the matrix is not finite, or too large for fixed point.
        """
        half = matrix.double() * 2.0 ** (fraction_bits - 1)
        units = (half + half.T).round_()  # exactly symmetric, which a matrix product need not be
        if not _fits(units):
            raise ValueError(f"a curvature of {pairs} pairs is not finite or above 2^{62 - fraction_bits}: {_TOO_LARGE}")
        return CurvatureSum(units.long(), fraction_bits, pairs)

    def merge(self, other: "CurvatureSum") -> "CurvatureSum":
        """The sum of both.

        Raises:
            ValueError: the two differ in size or `fraction_bits`, or their sum is too large.
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


class DampedCurvature(NamedTuple):
    """H + damping I in factorised form: solves for parameter changes, influence and self-influence."""

    cholesky: Tensor  # [k, k] lower, float64

    def solve(self, gradients: Tensor) -> Tensor:
        """(H + damping I)^-1 g of gradients [n, k], float64 [n, k]: the projected parameter change if the pair is removed."""
        return torch.cholesky_solve(gradients.to(self.cholesky).T, self.cholesky).T

    def influence(self, gradients: Tensor, queries: Tensor) -> Tensor:
        """The predicted change of each query's loss if a pair is removed.

        Args:
            gradients: [N, k] gradients of the pairs: positive part, negative part or their sum.
            queries: [T, k] gradients of the queries' losses, projected with `Projection.apply`.

        Returns:
            [T, N] float64, in loss units of the queries. Above 0 the pair helps.
        """
        return self.solve(queries) @ gradients.to(self.cholesky).T

    def self_influence(self, gradients: Tensor) -> Tensor:
        """Self-influence g^T (H + damping I)^-1 g >= 0, [N] float64: how far the heads memorise each pair.

        Args:
            gradients: [N, k] sum of each pair's positive and negative part.
        """
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


def _fits(units: Tensor) -> bool:
    least, most = units.aminmax()
    return least.item() > -_LIMIT and most.item() < _LIMIT  # False for NaN
