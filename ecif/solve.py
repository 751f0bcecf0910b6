"""The shared inverse-Hessian system (H + damping I) q = g, for every damping at once.

Conjugate gradient in its Lanczos form: the Krylov space of H and g does not depend on the damping, so one run of products
answers a whole grid of dampings, which calibration then chooses from. Several systems advance together, so that their products
can be computed in parallel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class KrylovSpaces(NamedTuple):
    """Lanczos bases of n systems after m steps: H V = V T + beta_m v_(m+1) e_m^T, T tridiagonal."""

    basis: Tensor  # [n, m, P] orthonormal rows
    diagonal: Tensor  # [n, m] of T, float64
    off_diagonal: Tensor  # [n, m] float64; the last column is beta_m, the residual's factor
    norm: Tensor  # [n] |g|, float64

    def solve(self, damping: Tensor) -> tuple[Tensor, Tensor]:
        """q [n, P] of each system, and the relative residuals [n] that are left; damping [n] (> 0) in the units of H."""
        steps = self.diagonal.shape[1]
        inner = self.off_diagonal[:, : steps - 1]
        t = torch.diag_embed(self.diagonal + damping.to(self.diagonal)[:, None])
        t = t + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
        y = torch.linalg.solve(t, torch.eye(steps, dtype=t.dtype)[0]) * self.norm[:, None]
        residual = (self.off_diagonal[:, -1] * y[:, -1]).abs() / self.norm
        return torch.einsum("nm,nmp->np", y.to(self.basis), self.basis), residual

    def largest_eigenvalue(self) -> Tensor:
        """[n] the largest Ritz value of H, which its largest eigenvalue is within a few percent of after a few steps."""
        inner = self.off_diagonal[:, :-1]
        t = torch.diag_embed(self.diagonal) + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
        return torch.linalg.eigvalsh(t)[:, -1]


def krylov(product: Callable[[Tensor], Tensor], gradients: Tensor, steps: int) -> KrylovSpaces:
    """Run `steps` Lanczos steps of every system.

    Args:
        product: H applied to each system's vector, [n, P] -> [n, P]; H symmetric, positive semi-definite, a system's own.
        gradients: g, [n, P]; a zero row is an error, there is nothing to ask.
        steps: at most this many; fewer where a space is exhausted before.

    Raises:
        ValueError: a gradient that is zero or not finite.
    """
    norm = gradients.double().norm(dim=1)
    if not (norm.isfinite() & (norm > 0)).all():
        raise ValueError("a target's gradient is zero or not finite: its loss does not depend on the heads")
    basis = gradients.new_zeros(len(gradients), steps + 1, gradients.shape[1])
    basis[:, 0] = gradients / norm.to(gradients)[:, None]
    diagonal, off_diagonal = norm.new_zeros(len(norm), steps), norm.new_zeros(len(norm), steps)
    for m in range(steps):
        w = product(basis[:, m])
        diagonal[:, m] = (w.double() * basis[:, m].double()).sum(1)
        known = basis[:, : m + 1]
        for _ in range(2):  # full reorthogonalisation, twice: float32 loses it otherwise
            w = w - torch.einsum("nm,nmp->np", torch.einsum("nmp,np->nm", known, w), known)
        beta = w.double().norm(dim=1)
        # An exhausted space ends in a zero vector, which adds nothing and leaves no residual.
        beta = beta.where(beta > 1e-6 * diagonal.abs().amax(1), 0.0)
        off_diagonal[:, m] = beta
        basis[:, m + 1] = torch.where(beta[:, None] > 0, w / beta.to(w)[:, None], 0.0)
        if not beta.any():
            steps = m + 1
            break
    return KrylovSpaces(basis[:, :steps], diagonal[:, :steps], off_diagonal[:, :steps], norm)
