"""Influence to second order: with the curvature that leaves with a pair, and with the curvature of the target.

When pair n is removed, the minimum moves by a Newton step on the rest of the loss, and the target loss changes by its
second-order expansion:

    delta_n = (H - H_n)^-1 g_n,    influence_n = <grad L_T, delta_n> + 1/2 delta_n^T H_T delta_n

All of it is in k coordinates in which H and H_T are small enough to solve with: all parameters of a small model, or a
projection of the heads' gradients. Three things make it cheap.

H_n, the curvature that leaves, is never formed, only multiplied with (`ecif.projected.leaving`).

H - H_n is never factored. The step is the best one, in the norm of H - H_n (Galerkin), within the span of H^-1 grad Pos_n,
H^-1 grad Neg_n and H^-1 H_n H^-1 g_n: a 3 x 3 system a pair. Within the span of H^-1 g_n alone it would be the scalar leverage
correction. Both parts of the gradient are in the span, so that without H_n both columns are those of first order.

The step does not depend on the target: one more target costs one more product with its k x k curvature.

A pair that the heads never saw (cross-fitting) is not part of H. The prediction is still that of its removal, from heads that
would have seen it. Its curvature therefore arrives instead of leaving, and the target is expanded at the other end of the step:

    delta_n = (H + H_n)^-1 g_n,    influence_n = <grad L_T, delta_n> - 1/2 delta_n^T H_T delta_n              held out

A projection sees only a share of each step. Where first-order influence is known exactly (`ecif.heads.influence`), add the
difference between second and first order within the projection to it. In the convex test, that improved on the exact first
order at every size of the projection, while the second order of a small projection alone was far below it.

See docs/method.md, "Second order". First order: Koh and Liang, arXiv 1703.04730.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.projected.leaving import DifferentiatedBatch, LeavingCurvature, RootWeights, solve_in_span

ENTRIES_AT_ONCE = 2**24  # numbers of the Jacobian that are held at a time


class RemovalSteps(NamedTuple):
    """How the minimum moves without each of m pairs of a batch; the step of pair n is positive_n + negative_n."""

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

    A pair costs 3 solves (k^2 multiply-adds each by an inverse or a factor), the 2 B entries of row n and column n, and
    16 B k + 16 k + 36 B multiply-adds on them. At B = 64, k = 256 (float32, one core) that takes 0.4 ms, where forming H - H_n
    and solving with it takes 7. Memory: ENTRIES_AT_ONCE numbers of the Jacobian, for as many pairs as these suffice for.

    Args:
        batch: of B >= 2 pairs.
        positive: [m, k], grad Pos_n of each of the pairs in the same coordinates.
        negative: [m, k], grad Neg_n, exact or Taylor.
        solve: H^-1 on rows, [m, k] -> [m, k]. H is symmetric positive definite: the Gauss-Newton matrix summed over all
            batches, this one included, plus damping.
        max_leverage: larger leverages are cut to this one (< 1), so that no step grows beyond 1 / (1 - max_leverage) times the
            first-order one, in the norm of H. More curvature can leave than H has if H was sampled or misses the batch. With
            the exact H, only a pair that holds a direction nearly alone comes near 1, and there no expansion is to be trusted.
            Held-out pairs need no cap.
        held_out: the heads were fitted without these pairs, and H does not hold them.
        pairs: [m] which pairs of the batch; by default all, in order.

    Returns:
        Steps in parameter units and the dtype of the gradients; 0 for a pair without gradient. `leverage` is returned uncut;
        that of a held-out pair is below 1.

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
    weights = RootWeights.of(batch.logits)
    steps = []
    for some in torch.arange(len(pairs), device=positive.device).split(max(1, ENTRIES_AT_ONCE // (2 * together * size))):
        curvature = LeavingCurvature.of(batch, weights, pairs[some])
        factored = curvature.factor(first[some])
        bend = curvature.adjoint(factored.sum(1))  # H_n H^-1 g_n
        again = solve(bend).to(parts)[:, None]
        trial = torch.cat([first[some], again], 1)  # [m, 3, k]
        factored = torch.cat([factored, curvature.factor(again)], 1)
        # H trial costs no product: H H^-1 x is x.
        whole = trial @ torch.cat([parts[some], bend[:, None]], 1).mT
        coefficients, leverage = solve_in_span(whole, factored @ factored.mT, None if held_out else max_leverage)
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
    half_step = (-0.5 if held_out else 0.5) * (steps.positive + steps.negative)
    half_way = gradients[:, None] + half_step @ curvatures  # [T, m, k]
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
    """Second order minus first order for one target, in k coordinates; add it to exact first-order influence.

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
