"""H_n: the part of a batch's curvature that leaves with pair n, in k coordinates.

P is the row softmax and Q the column softmax, J_ij in R^k is the derivative of S_ij, row_k = sum_j P_kj J_kj,
col_k = sum_i Q_ik J_ik, and x^2 is short for x x^T:

    H_n = sum_j P_nj (J_nj - row_n)^2 + sum_j Q_jn (J_jn - col_n)^2                       row n and column n leave
        + sum_{k != n} P_kn / (1 - P_kn) (J_kn - row_k)^2                                 one entry of every other row leaves,
        + sum_{k != n} Q_nk / (1 - Q_nk) (J_nk - col_k)^2                                 and of every other column
        - sum_{k != n} P_kn Cov(row k without n) + Q_nk Cov(column k without n)           whose softmax then adds to 1 again

The last line is left out, because only it has entries beyond row n and column n. Without it, H - H_n is positive definite for
every pair, and the agreement with retraining is the same. The rest is a sum of 4 B squares, so that products with H_n need no
matrix [k, k].
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class DifferentiatedBatch(Protocol):
    """A batch's logits and their derivatives in k coordinates; `ecif.projected.gradients.ProjectedBatch` is one."""

    @property
    def logits(self) -> Tensor:
        """S [B, B], row = text, column = image."""
        ...

    @property
    def row_mean(self) -> Tensor:
        """sum_j P_ij J_ij [B, k]."""
        ...

    @property
    def column_mean(self) -> Tensor:
        """sum_i Q_ij J_ij [B, k]."""
        ...

    def entries(self, i: Tensor, j: Tensor) -> Tensor:
        """J_ij at indices i [n] and j [n]: [n, k]."""
        ...


class RootWeights(NamedTuple):
    """Square roots of the weights of the four kinds of squares in H_n, each [B, B] at [n, j]."""

    row: Tensor  # root of P_nj
    column: Tensor  # root of Q_jn
    other_row: Tensor  # root of P_jn / (1 - P_jn), 0 where j = n
    other_column: Tensor  # root of Q_nj / (1 - Q_nj), 0 where j = n

    @classmethod
    def of(cls, logits: Tensor) -> "RootWeights":
        """The root weights of every pair of a batch, from its logits [B, B]."""
        p, q = logits.softmax(1), logits.softmax(0)
        return cls(p.sqrt(), q.T.sqrt(), _odds(p).T.sqrt(), _odds(q).sqrt())


class LeavingCurvature(NamedTuple):
    """H_n = F_n^T F_n of m pairs of a batch, as products with the factor F_n [4B, k] and with its transpose."""

    weights: RootWeights  # [m, B] each
    row: Tensor  # [m, B, k] J_nj
    column: Tensor  # [m, B, k] J_jn
    row_mean: Tensor  # [B, k]
    column_mean: Tensor  # [B, k]
    pairs: Tensor  # [m] the positions n of the pairs in the batch

    @classmethod
    def of(cls, batch: DifferentiatedBatch, weights: RootWeights, pairs: Tensor) -> "LeavingCurvature":
        """Take 2 B entries of the Jacobian for each of `pairs` [m].

        Args:
            batch: B pairs.
            weights: the root weights of that batch.
            pairs: [m] positions of the pairs that leave.
        """
        everyone = torch.arange(len(batch.logits), device=pairs.device)
        n, j = torch.meshgrid(pairs, everyone, indexing="ij")
        n, j, shape = n.flatten(), j.flatten(), n.shape
        row, column = batch.entries(n, j).unflatten(0, shape), batch.entries(j, n).unflatten(0, shape)
        return cls(RootWeights(*(w[pairs] for w in weights)), row, column, batch.row_mean, batch.column_mean, pairs)

    def factor(self, directions: Tensor) -> Tensor:
        """F_n x for r directions of each pair, [m, r, k] -> [m, r, 4B]."""
        row, column = directions @ self.row.mT, directions @ self.column.mT  # S'_nj, S'_jn
        row_mean, column_mean = directions @ self.row_mean.T, directions @ self.column_mean.T  # of row j, of column j
        own = self.pairs[:, None, None].expand(*directions.shape[:2], 1)
        w = self.weights
        return torch.cat(
            [
                w.row[:, None] * (row - row_mean.gather(2, own)),
                w.column[:, None] * (column - column_mean.gather(2, own)),
                w.other_row[:, None] * (column - row_mean),
                w.other_column[:, None] * (row - column_mean),
            ],
            2,
        )

    def adjoint(self, y: Tensor) -> Tensor:
        """F_n^T y for one y = F_n x of each pair, [m, 4B] -> [m, k]."""
        row, column, other_row, other_column = (w * part for w, part in zip(self.weights, y.chunk(4, 1), strict=True))
        # The means of row n and of column n drop out, because a tangent that is centred by its softmax has weighted sum 0.
        own = (row + other_column)[:, None] @ self.row + (column + other_row)[:, None] @ self.column
        return own[:, 0] - other_row @ self.row_mean - other_column @ self.column_mean


def solve_in_span(whole: Tensor, leaving: Tensor, max_leverage: float | None) -> tuple[Tensor, Tensor]:
    """Solve (H - H_n) x = g within the span of m trial vectors, for the two g whose H^-1 g are the first two of them.

    Args:
        whole: [B, m, m] Gram matrices of each pair's trial vectors in the inner product of H. Vectors may be parallel or zero.
        leaving: [B, m, m] their Gram matrices in the inner product of H_n.
        max_leverage: see `second_order.removal_steps`. None stands for a held-out pair: H does not include it, and the system
            that is solved is (H + H_n) x = g.

    Returns:
        Coefficients of the trial vectors [B, m, 2], and the largest leverage of each pair [B], both float64.

    Raises:
        ValueError: a value is not finite.
    """
    eps = torch.finfo(whole.dtype).eps
    whole, leaving = whole.double(), leaving.double()
    if not (whole.isfinite().all() and leaving.isfinite().all()):
        raise ValueError("logits, Jacobian, gradients or their solves are not finite, or overflow when squared")
    whole = (whole + whole.mT) / 2
    length = whole.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()[:, :, None]
    scale = torch.where(length > 0, 1 / length, 0.0)
    size, axes = torch.linalg.eigh(scale * whole * scale.mT)
    # Directions below the rounding error of the Gram matrix are left out: they are differences of parallel vectors, so noise.
    basis = scale * axes * torch.where(size > eps**0.75, size.clamp_min(eps).rsqrt(), 0.0)[:, None]
    leverage, axes = torch.linalg.eigh(basis.mT @ leaving @ basis)
    basis = basis @ axes
    leverage = leverage.clamp_min(0)
    if max_leverage is None:
        left, leverage = 1 + leverage, leverage / (1 + leverage)
    else:
        left = 1 - leverage.clamp_max(max_leverage)
    return basis / left[:, None] @ (basis.mT @ whole[:, :, :2]), leverage[:, -1]


def _odds(p: Tensor) -> Tensor:
    """P / (1 - P) off the diagonal, 0 on it.

    If 1 - P underflows, the odds are cut to 1 / eps. This loses nothing. The odds multiply the square of J_kn - row_k, which is
    1 - P times a difference of the logits' derivatives, so that the curvature of that entry is below eps.
    """
    odds = p / (1 - p).clamp_min(torch.finfo(p.dtype).eps)
    return odds - torch.diag(odds.diagonal())
