"""Influence to second order. It takes into account the curvature that leaves with a pair, and the curvature of the target.

When pair n is removed, the minimum moves by a Newton step on the rest of the loss. The target loss then changes by its
second-order expansion:

    delta_n = (H - H_n)^-1 g_n,    influence_n = <grad L_T, delta_n> + 1/2 delta_n^T H_T delta_n

H and H_T are [k, k] matrices, small enough to solve with. The k coordinates are all parameters of a small model, or a
projection of the heads' gradients. Three things make second order cheap:

- H_n, the curvature that leaves, is never formed. It is only multiplied with (`ecif.projected.leaving`).
- H - H_n is never factored. The step is the best one, in the norm of H - H_n (Galerkin), within the span of H^-1 grad Pos_n,
  H^-1 grad Neg_n and H^-1 H_n H^-1 g_n. That is a 3 x 3 system for each pair. The span of H^-1 g_n alone would give the scalar
  leverage correction. Both parts of the gradient are in the span, so that with H_n = 0 both columns are those of first order.
- The step does not depend on the target. Another target costs one more product with its [k, k] curvature.

With cross-fitting, the heads were fitted without the pair, and H does not include it. The prediction is still about its
removal, from heads that were fitted with it. The curvature H_n is therefore added, and the target is expanded at the other end
of the step:

    delta_n = (H + H_n)^-1 g_n,    influence_n = <grad L_T, delta_n> - 1/2 delta_n^T H_T delta_n              held out

A projection contains only a part of each step. If first-order influence is known exactly (`ecif.heads.influence`), add to it
the difference between second and first order within the projection, see `correction`. In the convex test, this agreed better
with the truth than exact first order at every size of the projection. Second order within a small projection alone agreed far
less.

See docs/method.md, "Second order". First order: Koh and Liang, arXiv 1703.04730.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.projected.leaving import DifferentiatedBatch, LeavingCurvature, RootWeights, solve_in_span

ENTRIES_AT_ONCE = 2**24  # numbers of the Jacobian that are held at once


class RemovalSteps(NamedTuple):
    """The moves of the minimum when each of m pairs is removed. The step of pair n is positive_n + negative_n."""

    positive: Tensor  # [m, k] (H - H_n)^-1 grad Pos_n, with H + H_n for held-out pairs
    negative: Tensor  # [m, k] (H - H_n)^-1 grad Neg_n, with H + H_n for held-out pairs
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
    16 B k + 16 k + 36 B multiply-adds on them. At B = 64, k = 256 (float32, one core) that takes 0.4 ms; forming H - H_n and
    solving with it takes 7 ms. Pairs are handled in groups that hold at most ENTRIES_AT_ONCE numbers of the Jacobian.

    Args:
        batch: B >= 2 pairs.
        positive: [m, k] grad Pos_n of each of the pairs in the same coordinates.
        negative: [m, k] grad Neg_n, exact or Taylor.
        solve: H^-1 on rows, [m, k] -> [m, k]. H is symmetric positive definite: the Gauss-Newton matrix summed over all
            batches, this one included, plus damping.
        max_leverage: larger leverages are cut to this value (< 1). A step is then at most 1 / (1 - max_leverage) times the
            first-order step, in the norm of H. H_n can exceed H if H was sampled or misses the batch. With the exact H, the
            leverage is near 1 only for a pair that is nearly alone in a direction, where no expansion can be trusted.
            Held-out pairs need no cap.
        held_out: the heads were fitted without these pairs, and H does not include them.
        pairs: [m] positions of the pairs in the batch; by default all, in order.

    Returns:
        Steps in parameter units and the dtype of the gradients; 0 for a pair without gradient. `leverage` is not cut; that of a
        held-out pair is below 1.

    Raises:
        ValueError: shapes do not fit, the batch has one pair, max_leverage is outside [0, 1), or a value is not finite.
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
        # H times the trial vectors needs no product, as H H^-1 x is x.
        whole = trial @ torch.cat([parts[some], bend[:, None]], 1).mT
        coefficients, leverage = solve_in_span(whole, factored @ factored.mT, None if held_out else max_leverage)
        steps.append((coefficients.to(trial).mT @ trial, leverage.to(trial)))
    moved, leverage = (torch.cat(part) for part in zip(*steps, strict=True))
    return RemovalSteps(moved[:, 0], moved[:, 1], leverage)


def target_change(steps: RemovalSteps, gradients: Tensor, curvatures: Tensor, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Change of each target's loss when each pair is removed, at k^2 + 2 k multiply-adds for each pair and target.

    Args:
        steps: the steps of m pairs.
        gradients: [T, k] grad L_T.
        curvatures: [T, k, k] H_T, the Gauss-Newton matrix of each target's loss, without damping.
        held_out: the same as for the steps.

    Returns:
        (positive, negative), each [T, m], in units of the target's summed loss. Their sum is the influence: above 0 the pair
        helps. Each part is its own step times the target's gradient half way along the whole step.
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
        gradient: [k] grad L_T.
        curvature: [k, k] H_T.

    Returns:
        (positive, negative, leverage), each [m]. The first two are in units of the target's summed loss.
    """
    steps = removal_steps(batch, positive, negative, solve, held_out=held_out, pairs=pairs)
    second = target_change(steps, gradient[None], curvature[None], held_out)
    q = solve(gradient[None])[0].to(positive)
    return second[0][0] - positive @ q, second[1][0] - negative @ q, steps.leverage
