"""CLIP's symmetric contrastive loss as a function of the logits, and its change when a pair is removed.

S [B, B] holds the logits, row = text, column = image. P is the softmax of every row, Q that of every column. Every function
but `pair_cotangents` also takes a stack of batches, S [..., B, B]. Sum convention:

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
    """L of each batch, [...], in loss units (nats), sum convention."""
    return pair_loss(logits).sum(-1)


def pair_loss(logits: Tensor) -> Tensor:
    """Pos_n [..., B]: the loss terms in which pair n is the positive. Their sum is L."""
    return logits.logsumexp(-1) + logits.logsumexp(-2) - 2 * diagonal(logits)


def loss_cotangent(logits: Tensor) -> Tensor:
    """dL/dS [..., B, B] = (P - I) + (Q - I)."""
    return logits.softmax(-1) + logits.softmax(-2) - 2 * torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)


def pair_cotangents(logits: Tensor) -> tuple[Tensor, Tensor]:
    """dPos_n/dS_nj = P_nj - I_nj and dPos_n/dS_in = Q_in - I_in as (rows, columns), each [B, B] with one row for each pair.

    The derivative with respect to S_nn, P_nn + Q_nn - 2, is in `rows`; in `columns` that entry is 0.
    """
    return softmax_cotangents(logits.softmax(1), logits.softmax(0).T)


def softmax_cotangents(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """`pair_cotangents` from the softmaxes p_nj over row n and q_ni over column n, each [B, B]."""
    return p + torch.diag(q.diagonal() - 2), q.clone().fill_diagonal_(0.0)


def gauss_newton_cotangent(logits: Tensor, tangent: Tensor) -> Tensor:
    """(d2L/dS2) S' [..., B, B] for a change S' of the logits: the sum of (diag(p) - p p^T) S' over rows and over columns."""
    p, q = logits.softmax(-1), logits.softmax(-2)
    return p * (tangent - (p * tangent).sum(-1, keepdim=True)) + q * (tangent - (q * tangent).sum(-2, keepdim=True))


def negative_loss(logits: Tensor, kind: Negative = "exact") -> Tensor:
    """Neg_n [..., B]: the loss that pair n adds, as a negative, to the other pairs of its batch."""
    return removed(logits, kind, -1) + removed(logits, kind, -2)


def pair_derivatives(logits: Tensor, tangent: Tensor, kind: Negative = "exact") -> tuple[Tensor, Tensor]:
    """Derivatives of every Pos_n and Neg_n when the logits move by S'.

    Args:
        logits: S, [..., B, B].
        tangent: S', [..., B, B]. It may have more leading dimensions than S: all of these changes share the softmaxes.
        kind: "exact" for -log(1 - P), "taylor" for P.

    Returns:
        (dPos, dNeg), each [..., B], in the units of the tangent times loss.
    """
    row_mean, from_rows = removed_derivative(logits, tangent, kind, -1)
    column_mean, from_columns = removed_derivative(logits, tangent, kind, -2)
    return row_mean + column_mean - 2 * diagonal(tangent), from_rows + from_columns


def removed(logits: Tensor, kind: Negative, dim: int) -> Tensor:
    """[..., B]: by how much the log-sum-exps of all items k != n fall, together, when item n is removed.

    Args:
        logits: S, [..., B, B].
        kind: "exact" for -log(1 - P), "taylor" for P.
        dim: -1 for the log-sum-exps of rows, -2 for those of columns.
    """
    change = logits.softmax(dim)
    if kind == "exact":
        # 1 - P can underflow only at the largest entry. There, the log-sum-exp of the others is taken directly.
        top, lse_others, _ = without_largest(logits, dim)
        change = -torch.log1p(-change.scatter(dim, top, 0.0))
        change = change.scatter(dim, top, logits.logsumexp(dim, keepdim=True) - lse_others)
    return off_diagonal(change).sum(-3 - dim)


def removed_derivative(logits: Tensor, tangent: Tensor, kind: Negative, dim: int) -> tuple[Tensor, Tensor]:
    """Derivatives along S' of the log-sum-exps along `dim`, and of `removed`.

    Let P_k be the softmax of row (or column) k, and mean_k the mean of S' under it: the log-sum-exp of k moves by mean_k. Then

        removed'_n = sum over k != n of w_kn (S'_kn - mean_k),   w = P / (1 - P) (exact) or P (taylor)

    1 - P may underflow at the largest entry of k. There, P / (1 - P) (S'_kn - mean_k) = P (S'_kn - mean of the other entries).
    One exponential an entry is enough: P of the other entries is measured from the second largest one.

    Args:
        logits: S, [..., B, B].
        tangent: S', see `pair_derivatives`.
        kind: as in `removed`.
        dim: as in `removed`.

    Returns:
        (mean, removed'), each [..., B].
    """
    if logits.shape[-1] < 2:
        return diagonal(tangent), torch.zeros_like(diagonal(tangent))  # there are no other entries
    first, top = logits.max(dim, keepdim=True)
    rest = logits.scatter(dim, top, float("-inf"))
    second = rest.amax(dim, keepdim=True)
    others, gap = rest.sub_(second).exp_(), (second - first).exp()
    total = others.sum(dim, keepdim=True)
    p_top = 1 / (1 + total * gap)

    each = (*tangent.shape[:-2], *top.shape[-2:])
    at_top = tangent.gather(dim, top.expand(each))
    mean_others = (others * tangent).sum(dim, keepdim=True) / total
    mean = p_top * at_top + p_top * gap * total * mean_others

    weight = others.mul_(p_top * gap)  # P, but 0 at the largest entries
    weight = off_diagonal(weight.div_(1 - weight) if kind == "exact" else weight)
    largest = off_diagonal(torch.zeros_like(weight).scatter_(dim, top, 1.0))
    top_change = p_top * (at_top - (mean_others if kind == "exact" else mean))
    change = (weight * tangent).sum(-3 - dim) - _summed(mean, weight, dim) + _summed(top_change, largest, dim)
    return mean.squeeze(dim), change


def _summed(of_items: Tensor, weight: Tensor, dim: int) -> Tensor:
    """[..., n]: the sum over k of a number of item k, which has `dim` as 1, times w_kn. Its order is fixed on every device."""
    return (of_items.mT @ weight).squeeze(-2) if dim == -1 else (weight @ of_items.mT).squeeze(-1)


def diagonal(matrix: Tensor) -> Tensor:
    """The diagonals [..., B]."""
    return matrix.diagonal(dim1=-2, dim2=-1)


def off_diagonal(matrix: Tensor) -> Tensor:
    """Set the diagonals to 0, even where they are not finite: a pair is not its own negative."""
    return matrix.masked_fill(torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device), 0.0)


def without_largest(logits: Tensor, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """The position of the largest entry along `dim`, and log-sum-exp and softmax of all other entries; `dim` is kept."""
    top = logits.argmax(dim, keepdim=True)
    rest = logits.scatter(dim, top, float("-inf"))
    return top, rest.logsumexp(dim, keepdim=True), rest.softmax(dim)
