"""CLIP's symmetric contrastive loss as a function of the logits, and its change when a pair is removed.

S [B, B] holds the logits, row = text, column = image. P is the softmax of every row, Q that of every column. Sum convention:

    L = sum_i [LSE_j S_ij - S_ii] + sum_j [LSE_i S_ij - S_jj]        (open_clip's ClipLoss is L / 2B)

Deleting pair n deletes row n and column n of S. The change of the loss is exactly (docs/method.md; ECIF, arXiv 2411.11667):

    L(B) - L(B without n) = Pos_n + Neg_n
    Pos_n = LSE_j S_nj + LSE_i S_in - 2 S_nn                          as a positive
    Neg_n = sum_{k != n} [-log(1 - P_kn) - log(1 - Q_nk)]             as a negative, exact
          ~ sum_{k != n} [P_kn + Q_nk]                                the paper's Taylor step
"""

from typing import Literal

import torch
from torch import Tensor

Negative = Literal["exact", "taylor"]


def batch_loss(logits: Tensor) -> Tensor:
    """L of one batch [B, B], a scalar in loss units (nats), sum convention."""
    return pair_loss(logits).sum()


def pair_loss(logits: Tensor) -> Tensor:
    """Pos_n [B]: the loss terms in which pair n is the positive. Their sum is L."""
    return logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()


def loss_cotangent(logits: Tensor) -> Tensor:
    """dL/dS [B, B] = (P - I) + (Q - I)."""
    return logits.softmax(1) + logits.softmax(0) - 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device)


def pair_cotangents(logits: Tensor) -> tuple[Tensor, Tensor]:
    """dPos_n/dS_nj = P_nj - I_nj and dPos_n/dS_in = Q_in - I_in as (rows, columns), each [B, B] with one row for each pair.

    The derivative with respect to S_nn, P_nn + Q_nn - 2, is in `rows`; in `columns` that entry is 0.
    """
    return softmax_cotangents(logits.softmax(1), logits.softmax(0).T)


def softmax_cotangents(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """`pair_cotangents` from the softmaxes p_nj over row n and q_ni over column n, each [B, B]."""
    return p + torch.diag(q.diagonal() - 2), q.clone().fill_diagonal_(0.0)


def gauss_newton_cotangent(logits: Tensor, tangent: Tensor) -> Tensor:
    """(d2L/dS2) S' [B, B] for a change S' of the logits: the sum of (diag(p) - p p^T) S' over rows and over columns."""
    p, q = logits.softmax(1), logits.softmax(0)
    return p * (tangent - (p * tangent).sum(1, keepdim=True)) + q * (tangent - (q * tangent).sum(0, keepdim=True))


def negative_loss(logits: Tensor, kind: Negative = "exact") -> Tensor:
    """Neg_n [B]: the loss that pair n adds, as a negative, to the other pairs of its batch."""
    return removed_from_rows(logits, kind).sum(0) + removed_from_rows(logits.T, kind).sum(0)


def pair_derivatives(logits: Tensor, tangent: Tensor, kind: Negative = "exact") -> tuple[Tensor, Tensor]:
    """Derivatives of every Pos_n and Neg_n when the logits move by S'.

    Args:
        logits: S, [B, B].
        tangent: S', [B, B].
        kind: "exact" for -log(1 - P), "taylor" for P.

    Returns:
        (dPos, dNeg), each [B], in the units of the tangent times loss.
    """
    row_mean = (logits.softmax(1) * tangent).sum(1)
    column_mean = (logits.softmax(0) * tangent).sum(0)
    positive = row_mean + column_mean - 2 * tangent.diagonal()
    rows = removed_from_rows_derivative(logits, tangent, kind)
    columns = removed_from_rows_derivative(logits.T, tangent.T, kind)
    return positive, rows.sum(0) + columns.sum(0)


def removed_from_rows(logits: Tensor, kind: Negative) -> Tensor:
    """[k, n]: by how much the log-sum-exp of row k falls when column n is removed; 0 on the diagonal."""
    p = logits.softmax(1)
    if kind == "exact":
        # 1 - P can underflow only at the largest entry of a row. There, the log-sum-exp of the others is taken directly.
        top, lse_others, _ = without_largest(logits)
        change = -torch.log1p(-p.scatter(1, top, 0.0))
        change = change.scatter(1, top, logits.logsumexp(1, keepdim=True) - lse_others)
    else:
        change = p
    return _off_diagonal(change)


def removed_from_rows_derivative(logits: Tensor, tangent: Tensor, kind: Negative) -> Tensor:
    """Derivative [k, n] of `removed_from_rows` along `tangent`."""
    p = logits.softmax(1)
    centred = tangent - (p * tangent).sum(1, keepdim=True)
    if kind == "exact":
        top, _, others = without_largest(logits)
        weight = p / (1 - p).scatter(1, top, 1.0)
        # At the largest entry P/(1-P) (S'_kn - mean) = P (S'_kn - mean of the others), without the cancellation.
        at_top = tangent.gather(1, top) - (others * tangent).sum(1, keepdim=True)
        change = (weight * centred).scatter(1, top, p.gather(1, top) * at_top)
    else:
        change = p * centred
    return _off_diagonal(change)


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Set the diagonal to 0, even where it is not finite: a pair is not its own negative."""
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool, device=matrix.device), 0.0)


def without_largest(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row, the column of its largest entry [B, 1], and log-sum-exp [B, 1] and softmax [B, B] of all other entries."""
    top = logits.argmax(1, keepdim=True)
    rest = logits.scatter(1, top, float("-inf"))
    return top, rest.logsumexp(1, keepdim=True), rest.softmax(1)
