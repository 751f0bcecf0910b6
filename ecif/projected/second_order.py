"""Influence to second order: the curvature that leaves with a pair, and the curvature of the target.

Without pair n the minimum moves by a Newton step on what is left, and the target loss by its second-order expansion:

    delta_n = (H - H_n)^-1 g_n,    influence_n = <grad L_T, delta_n> + 1/2 delta_n^T H_T delta_n

in k coordinates in which H and H_T are small enough to solve with: all parameters of a small model, or a projection of the
heads' gradients. Three things make it cheap.

H_n, the curvature that leaves, is never formed. With P the row and Q the column softmax, J_ij = dS_ij in R^k,
row_k = sum_j P_kj J_kj, col_k = sum_i Q_ik J_ik, and x^2 short for x x^T:

    H_n = sum_j P_nj (J_nj - row_n)^2 + sum_j Q_jn (J_jn - col_n)^2                       row n and column n leave
        + sum_{k != n} P_kn / (1 - P_kn) (J_kn - row_k)^2                                 one entry of every other row leaves,
        + sum_{k != n} Q_nk / (1 - Q_nk) (J_nk - col_k)^2                                 and of every other column
        - sum_{k != n} P_kn Cov(row k without n) + Q_nk Cov(column k without n)           whose softmax then adds to 1 again

The last line is left out. It alone touches entries beyond row n and column n; without it H - H_n is positive definite for every
pair, and the agreement with retraining is the same.

H - H_n is never factored. The step is the best one (in the norm of H - H_n: Galerkin) in the span of H^-1 grad Pos_n,
H^-1 grad Neg_n and H^-1 H_n H^-1 g_n, a 3 x 3 system a pair. In the span of H^-1 g_n alone it would be the scalar leverage
correction. Both parts of the gradient are in the span, so that without H_n both columns are the first-order ones.

The step belongs to no target: one more target is one more product with its k x k curvature.

A pair that the heads never saw (cross-fitting) is not part of H. What is predicted is still its removal, from heads that would
have seen it: curvature arrives with it instead of leaving, and the target is expanded at the other end of the step:

    delta_n = (H + H_n)^-1 g_n,    influence_n = <grad L_T, delta_n> - 1/2 delta_n^T H_T delta_n              held out

A projection sees only a share of each step. Where first-order influence is known exactly (`ecif.heads.influence`), add to
it the difference between second and first order within the projection. In the convex test that improved on the exact first
order at every size of the projection, where the second order of a small projection alone was far below it.

See docs/method.md, "Second order". First order: Koh and Liang, arXiv 1703.04730.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ENTRIES_AT_ONCE = 2**24  # numbers of the Jacobian held at a time


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


class RemovalSteps(NamedTuple):
    """Where the minimum goes without each of m pairs of a batch; the step of pair n is positive_n + negative_n."""

    positive: Tensor  # [m, k] (H - H_n)^-1 grad Pos_n; H + H_n for held-out pairs
    negative: Tensor  # [m, k] (H - H_n)^-1 grad Neg_n
    leverage: Tensor  # [m] the pair's largest share, along any direction of the span, of the curvature that includes it


def removal_steps(
    batch: DifferentiatedBatch,
    positive: Tensor,
    negative: Tensor,
    solve: Callable[[Tensor], Tensor],
    max_leverage: float = 0.95,
    held_out: bool = False,
    pairs: Tensor | None = None,
) -> RemovalSteps:
    """The move of the parameters when pairs of one batch are removed, one at a time, to second order.

    Costs 3 solves (k^2 multiply-adds each by an inverse or a factor), the 2 B entries of row n and column n, and
    16 B k + 16 k + 36 B multiply-adds on them a pair; 0.4 ms at B = 64, k = 256 (float32, one core), where forming and solving
    with H - H_n takes 7. Memory: as many pairs at a time as have 2^24 numbers in their entries.

    Args:
        batch: of B >= 2 pairs.
        positive: [m, k], grad Pos_n of each of the pairs in the same coordinates.
        negative: [m, k], grad Neg_n, exact or Taylor.
        solve: H^-1 on rows, [m, k] -> [m, k]. H is symmetric positive definite: the Gauss-Newton matrix summed over all
            batches, this one included, plus damping.
        max_leverage: from this leverage on (< 1) a pair counts as having this one, so that no step grows beyond
            1 / (1 - max_leverage) times the first-order one, in the norm of H. An H that was sampled or misses the batch can
            have less curvature than leaves; with the exact H it takes a pair that holds a direction nearly alone, where no
            expansion is to be trusted. Held-out pairs need no cap.
        held_out: the heads were fitted without these pairs, and H does not hold them.
        pairs: [m] which pairs of the batch; by default all, in order.

    Returns:
        Steps in parameter units and the dtype of the gradients; 0 for a pair without gradient. `leverage` is not capped; that
        of a held-out pair is below 1.

    Raises:
        ValueError: shapes that do not fit, fewer than two pairs, max_leverage outside [0, 1), or values that are not finite.
    """
    size = positive.shape[1]
    pairs = torch.arange(len(batch.logits), device=positive.device) if pairs is None else pairs
    shapes = [tuple(t.shape) for t in (batch.logits, batch.row_mean, batch.column_mean, positive, negative)]
    together = len(batch.logits)
    if shapes != [(together, together)] + 2 * [(together, size)] + 2 * [(len(pairs), size)]:
        raise ValueError(f"logits [B, B], row_mean, column_mean [B, k], positive and negative [m, k] do not fit: {shapes}")
    if together < 2:
        raise ValueError("a batch of one pair has no negatives and no curvature")
    if not 0 <= max_leverage < 1:
        raise ValueError(f"max_leverage is a share in [0, 1), not {max_leverage}")

    parts = torch.stack([positive, negative], 1)
    first = solve(parts.flatten(0, 1)).to(parts).view_as(parts)
    weights = _Weights.of(batch.logits)
    steps = []
    for some in torch.arange(len(pairs), device=positive.device).split(max(1, ENTRIES_AT_ONCE // (2 * together * size))):
        curvature = _Leaving.of(batch, weights, pairs[some])
        felt = curvature.factor(first[some])
        bend = curvature.adjoint(felt.sum(1))  # H_n H^-1 g_n
        again = solve(bend).to(parts)[:, None]
        trial = torch.cat([first[some], again], 1)  # [m, 3, k]
        felt = torch.cat([felt, curvature.factor(again)], 1)
        # H trial costs no product: it is what was solved for.
        whole = trial @ torch.cat([parts[some], bend[:, None]], 1).mT
        coefficients, leverage = _galerkin(whole, felt @ felt.mT, None if held_out else max_leverage)
        steps.append((coefficients.to(trial).mT @ trial, leverage.to(trial)))
    moved, leverage = (torch.cat(part) for part in zip(*steps, strict=True))
    return RemovalSteps(moved[:, 0], moved[:, 1], leverage)


def target_change(steps: RemovalSteps, gradients: Tensor, curvatures: Tensor, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Change of each target's loss when each pair is removed: k^2 + 2 k multiply-adds a pair and target.

    Args:
        steps: of m pairs.
        gradients: [T, k], grad L_T.
        curvatures: [T, k, k], H_T, Gauss-Newton of each target's loss, without damping.
        held_out: as the steps were taken.

    Returns:
        (positive, negative), each [T, m], in units of the target's summed loss; their sum is the influence: above 0 the pair
        helps. The quadratic term is shared so that each part is its step times the target's gradient half way.
    """
    half_a_step = (-0.5 if held_out else 0.5) * (steps.positive + steps.negative)
    half_way = gradients[:, None] + half_a_step @ curvatures  # [T, m, k]
    return (half_way * steps.positive).sum(2), (half_way * steps.negative).sum(2)


def correction(
    batch: DifferentiatedBatch,
    positive: Tensor,
    negative: Tensor,
    solve: Callable[[Tensor], Tensor],
    gradient: Tensor,
    curvature: Tensor,
    held_out: bool = False,
    pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the second order adds to the first, for one target, in k coordinates: to be added to exact first-order influence.

    Args:
        batch, positive, negative, solve, held_out, pairs: as of `removal_steps`.
        gradient: [k], grad L_T.
        curvature: [k, k], H_T.

    Returns:
        (positive, negative, leverage), each [m]; the first two in units of the target's summed loss.
    """
    steps = removal_steps(batch, positive, negative, solve, held_out=held_out, pairs=pairs)
    second = target_change(steps, gradient[None], curvature[None], held_out)
    q = solve(gradient[None])[0].to(positive)
    return second[0][0] - positive @ q, second[1][0] - negative @ q, steps.leverage


class _Weights(NamedTuple):
    """Roots of the weights in H_n, [n, j]."""

    row: Tensor  # of P_nj
    column: Tensor  # of Q_jn
    other_row: Tensor  # of P_jn / (1 - P_jn), 0 where j = n
    other_column: Tensor  # of Q_nj / (1 - Q_nj), 0 where j = n

    @classmethod
    def of(cls, logits: Tensor) -> "_Weights":
        p, q = logits.softmax(1), logits.softmax(0)
        return cls(p.sqrt(), q.T.sqrt(), _odds(p).T.sqrt(), _odds(q).sqrt())


class _Leaving(NamedTuple):
    """H_n = F_n^T F_n of m pairs of a batch, F_n [4B, k], as products with F_n and its transpose."""

    weights: _Weights  # [m, B] each
    row: Tensor  # [m, B, k] J_nj
    column: Tensor  # [m, B, k] J_jn
    row_mean: Tensor  # [B, k]
    column_mean: Tensor  # [B, k]
    pairs: Tensor  # [m] n

    @classmethod
    def of(cls, batch: DifferentiatedBatch, weights: _Weights, pairs: Tensor) -> "_Leaving":
        everyone = torch.arange(len(batch.logits), device=pairs.device)
        n, j = torch.meshgrid(pairs, everyone, indexing="ij")
        n, j, shape = n.flatten(), j.flatten(), n.shape
        row, column = batch.entries(n, j).unflatten(0, shape), batch.entries(j, n).unflatten(0, shape)
        return cls(_Weights(*(w[pairs] for w in weights)), row, column, batch.row_mean, batch.column_mean, pairs)

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

    def adjoint(self, felt: Tensor) -> Tensor:
        """F_n^T y for one y = F_n x of each pair, [m, 4B] -> [m, k]."""
        row, column, other_row, other_column = (w * y for w, y in zip(self.weights, felt.chunk(4, 1), strict=True))
        # Row n's and column n's own means drop out: a centred tangent, weighted by its softmax, sums to 0.
        own = (row + other_column)[:, None] @ self.row + (column + other_row)[:, None] @ self.column
        return own[:, 0] - other_row @ self.row_mean - other_column @ self.column_mean


def _odds(p: Tensor) -> Tensor:
    """P / (1 - P) off the diagonal, 0 on it.

    Where 1 - P underflows, the odds stop at 1 / eps. Nothing is lost: they multiply the square of J_kn - Jr_k, which is 1 - P
    times a difference of logits' derivatives, so that all of that entry's curvature is below eps.
    """
    odds = p / (1 - p).clamp_min(torch.finfo(p.dtype).eps)
    return odds - torch.diag(odds.diagonal())


def _galerkin(whole: Tensor, own: Tensor, max_leverage: float | None) -> tuple[Tensor, Tensor]:
    """Solve (whole - own) c = whole's first two columns: coefficients [B, m, 2], and the leverages [B], in float64.

    Both are Gram matrices [B, m, m] of m trial vectors, in the inner products of H and H_n. Vectors may be parallel or zero.
    Without `max_leverage` H does not hold the pair: whole + own.
    """
    eps = torch.finfo(whole.dtype).eps
    whole, own = whole.double(), own.double()
    if not (whole.isfinite().all() and own.isfinite().all()):
        raise ValueError("logits, Jacobian, gradients or their solves are not finite, or overflow when squared")
    whole = (whole + whole.mT) / 2
    length = whole.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()[:, :, None]
    scale = torch.where(length > 0, 1 / length, 0.0)
    size, axes = torch.linalg.eigh(scale * whole * scale.mT)
    # Directions below the rounding error of the Gram matrix are parallel vectors' differences: noise.
    basis = scale * axes * torch.where(size > eps**0.75, size.clamp_min(eps).rsqrt(), 0.0)[:, None]
    leverage, axes = torch.linalg.eigh(basis.mT @ own @ basis)
    basis = basis @ axes
    leverage = leverage.clamp_min(0)
    if max_leverage is None:
        left, leverage = 1 + leverage, leverage / (1 + leverage)
    else:
        left = 1 - leverage.clamp_max(max_leverage)
    return basis / left[:, None] @ (basis.mT @ whole[:, :, :2]), leverage[:, -1]
