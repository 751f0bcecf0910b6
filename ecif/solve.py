"""Solve (H + damping I) q = g using products with H only, and find the largest eigenvalue of H.

H is a Gauss-Newton matrix that is too large to form. Its largest eigenvalue is the unit of a relative damping. Several systems,
one for each target's gradient g, advance together, so that their products can be computed in parallel. There are two solvers:

- `krylov` is conjugate gradient in its Lanczos form. The Krylov space of H and g does not depend on the damping, so one run of
  products answers a whole grid of dampings, which calibration then chooses from. It keeps a vector of length P for every step.
- `conjugate_gradient` answers one damping for each system and stops at a given residual. It keeps four vectors for each system,
  however many steps it takes. Use it for many parameters: one vector of all parameters of a ViT-B/32 takes 0.6 GB.

With `krylov`, the largest eigenvalue is `KrylovSpaces.largest_eigenvalue`. Without it, use `largest_eigenvalue`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MATRIX_STEPS = 24  # Lanczos steps on an explicit matrix
EXHAUSTED = 1e-6  # a Krylov space is exhausted if a step adds less than this share of the curvature: that is rounding error


class KrylovSpaces(NamedTuple):
    """Lanczos bases of n systems after m steps: H V = V T + beta_m v_(m+1) e_m^T, T tridiagonal.

    The bases are large. They may be somewhere else, so only combinations of their vectors can be had.
    """

    combine: Callable[[Tensor], Tensor]  # [n, m] coefficients -> [n, P], sums of each system's basis vectors
    diagonal: Tensor  # [n, m] of T, float64
    off_diagonal: Tensor  # [n, m] of T, float64; the last column is beta_m, a factor of the residual
    norm: Tensor  # [n] |g|, float64

    def solve(self, damping: Tensor) -> tuple[Tensor, Tensor]:
        """Solve every system at one damping.

        Args:
            damping: [n], above 0, in the units of H.

        Returns:
            q [n, P], and the relative residuals |g - (H + damping I) q| / |g| [n], float64.
        """
        steps = self.diagonal.shape[1]
        t = _tridiagonal(self.diagonal + damping.to(self.diagonal)[:, None], self.off_diagonal[:, : steps - 1])
        y = torch.linalg.solve(t, torch.eye(steps, dtype=t.dtype)[0]) * self.norm[:, None]
        residual = (self.off_diagonal[:, -1] * y[:, -1]).abs() / self.norm
        return self.combine(y), residual

    def largest_eigenvalue(self) -> Tensor:
        """The largest Ritz value of each system, [n] float64; after a few steps it is within a few percent of H's largest."""
        return _largest_ritz_value(self.diagonal, self.off_diagonal[:, :-1])


class Lanczos:
    """Lanczos steps of n systems, one at a time: the caller computes the products of `vectors`.

    Args:
        gradients: g, [n, P], on the device to compute on.
        steps: the most steps to take.

    Raises:
        ValueError: a gradient is zero or not finite.
    """

    def __init__(self, gradients: Tensor, steps: int):
        self.norm = gradient_norms(gradients)
        self.basis = gradients.new_zeros(len(gradients), steps + 1, gradients.shape[1])  # [n, m, P] orthonormal rows
        self.basis[:, 0] = gradients / self.norm.to(gradients)[:, None]
        self._diagonal, self._off_diagonal = (self.norm.new_zeros(len(gradients), steps) for _ in range(2))
        self._taken = 0

    @property
    def vectors(self) -> Tensor:
        """[n, P] to be multiplied next."""
        return self.basis[:, self._taken]

    def step(self, products: Tensor) -> bool:
        """Take a step, given H `vectors`; False if it was the last: no more are asked for, or all spaces are exhausted."""
        m, w = self._taken, products.to(self.basis)
        self._diagonal[:, m] = _dot(w.double(), self.basis[:, m].double())
        known = self.basis[:, : m + 1]
        for _ in range(2):  # full reorthogonalisation, twice: in float32 the basis would lose its orthogonality otherwise
            w = w - torch.einsum("nm,nmp->np", torch.einsum("nmp,np->nm", known, w), known)
        beta = w.double().norm(dim=1)
        # In an exhausted space, the next vector is set to zero: it adds nothing, and the residual is 0.
        beta = beta.where(beta > EXHAUSTED * self._diagonal.abs().amax(1), 0.0)
        self._off_diagonal[:, m] = beta
        self.basis[:, m + 1] = torch.where(beta[:, None] > 0, w / beta.to(w)[:, None], 0.0)
        self._taken += 1
        return self._taken < self._diagonal.shape[1] and bool(beta.any())

    def spaces(self) -> KrylovSpaces:
        """What the steps so far have found; all but the combinations on the CPU."""
        diagonal, off_diagonal = (part[:, : self._taken].cpu() for part in (self._diagonal, self._off_diagonal))
        return KrylovSpaces(self.combine, diagonal, off_diagonal, self.norm.cpu())

    def combine(self, coefficients: Tensor) -> Tensor:
        """See `KrylovSpaces`."""
        return torch.einsum("nm,nmp->np", coefficients.to(self.basis), self.basis[:, : self._taken])


class Solution(NamedTuple):
    """Directions of n targets, and the residuals of their systems."""

    directions: Tensor  # [n, P] q
    residual: Tensor  # [n] |g - (H + damping I) q| / |g|, float64
    iterations: int  # products that the slowest system took


def krylov(product: Callable[[Tensor], Tensor], gradients: Tensor, steps: int) -> KrylovSpaces:
    """Take `steps` Lanczos steps of every system.

    Args:
        product: H applied to each system's vector, [n, P] -> [n, P]. Each system may have an H of its own, symmetric and
            positive semi-definite.
        gradients: g, [n, P].
        steps: the most steps to take; fewer are taken if all spaces are exhausted before.

    Raises:
        ValueError: a gradient is zero or not finite.
    """
    lanczos = Lanczos(gradients, steps)
    while lanczos.step(product(lanczos.vectors)):
        pass
    return lanczos.spaces()


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    gradients: Tensor,
    damping: float | Tensor,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
) -> Solution:
    """Conjugate gradient on (H + damping I) q = g.

    Args:
        product: H applied to rows, [k, P] -> [k, P], for the k <= n systems that are not solved yet. All systems share one H,
            symmetric and positive semi-definite.
        gradients: g of each target, [n, P].
        damping: above 0, in the units of H; one for all targets, or one for each [n].
        tolerance: a system stops when |g - (H + damping I) q| <= tolerance |g|.
        max_iterations: the most products to take. If a system stops because of it, its residual is above `tolerance`.

    Raises:
        ValueError: a damping is not above 0, or a gradient is zero or not finite.
    """
    damping = torch.as_tensor(damping).to(gradients).expand(len(gradients))[:, None]
    if not (damping > 0).all():
        raise ValueError(f"damping {damping.min():g} has to be above 0: the Gauss-Newton matrix is singular")
    norm = _checked(_dot(gradients, gradients).sqrt())
    q, residual, step = torch.zeros_like(gradients), gradients.clone(), gradients.clone()
    square, iterations = norm**2, 0
    while iterations < max_iterations:
        open_ = (square.sqrt() > tolerance * norm).nonzero()[:, 0]
        if not len(open_):
            break
        curved = product(step[open_]) + damping[open_] * step[open_]
        length = (square[open_] / _dot(step[open_], curved))[:, None].to(q)
        q[open_] += length * step[open_]
        residual[open_] -= length * curved
        after = _dot(residual[open_], residual[open_])
        step[open_] = residual[open_] + (after / square[open_])[:, None].to(q) * step[open_]
        square[open_] = after
        iterations += 1
    return Solution(q, square.sqrt() / norm, iterations)


def largest_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor, steps: int = 8) -> Tensor:
    """The largest eigenvalue of H in the Krylov space of each start vector, by Lanczos steps that keep no basis.

    It keeps three vectors for each system. Without reorthogonalisation, rounding causes copies of an eigenvalue, but none that
    is too large.

    Args:
        product: H applied to rows, [n, P] -> [n, P]; symmetric, positive semi-definite.
        start: [n, P], such as the targets' gradients.
        steps: products to take. A few steps come within a few percent, as the largest eigenvalue of a Gauss-Newton matrix
            stands out.

    Returns:
        [n], float64.

    Raises:
        ValueError: a start vector is zero or not finite.
    """
    before, beta = torch.zeros_like(start), start.new_zeros(len(start), 1)
    vector = start / _checked(_dot(start, start).sqrt())[:, None].to(start)
    diagonal, off_diagonal = (start.new_zeros(len(start), steps, dtype=torch.float64) for _ in range(2))
    for m in range(steps):
        w = product(vector)
        diagonal[:, m] = _dot(w, vector)
        w = w - diagonal[:, m, None].to(w) * vector - beta * before
        beta = _dot(w, w).sqrt()[:, None].to(w)
        beta = beta.where(beta > EXHAUSTED * diagonal[:, m, None].to(w), 0.0)
        off_diagonal[:, m] = beta[:, 0]
        before, vector = vector, torch.where(beta > 0, w / beta, 0.0)
    return _largest_ritz_value(diagonal, off_diagonal[:, :-1])


def largest_eigenvalue_of_matrix(matrix: Tensor) -> float:
    """The largest eigenvalue of a symmetric matrix [k, k], by MATRIX_STEPS Lanczos steps; all eigenvalues would cost k^3."""
    start = matrix.new_ones(1, len(matrix))
    return krylov(lambda v: v @ matrix, start, MATRIX_STEPS).largest_eigenvalue().item()


def _tridiagonal(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """T [n, m, m] from its diagonal [n, m] and its off-diagonal [n, m - 1]."""
    return torch.diag_embed(diagonal) + torch.diag_embed(off_diagonal, 1) + torch.diag_embed(off_diagonal, -1)


def _largest_ritz_value(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """[n] the largest eigenvalue of each T."""
    return torch.linalg.eigvalsh(_tridiagonal(diagonal, off_diagonal))[:, -1]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [n] of rows, summed in float64."""
    return (a * b).sum(1, dtype=torch.float64)


def gradient_norms(gradients: Tensor) -> Tensor:
    """|g| [n], float64, of gradients [n, P]; ValueError if one is zero or not finite."""
    return _checked(gradients.double().norm(dim=1))


def _checked(norm: Tensor) -> Tensor:
    """The norms [n] of gradients, if each is finite and not zero; ValueError otherwise."""
    if not (norm.isfinite() & (norm > 0)).all():
        raise ValueError("a target's gradient is zero or not finite: its loss does not depend on the parameters")
    return norm
