"""An estimate of the projected Gauss-Newton matrix from drawn labels, for ranks at which the exact one costs too much.

No stage of `ecif run` uses it. `tests/benchmarks` compare its cost and its quality with those of the exact matrix.
"""

import torch
from torch import Tensor

from ecif.projected.gradients import ProjectedBatch
from ecif.projected.projection import random_bytes


def sampled_gauss_newton(batch: ProjectedBatch, key: str, draws: int = 1) -> Tensor:
    """An unbiased estimate of `curvature.gauss_newton` from outer products of pseudo-gradients, at cost B k^2 a draw.

    Every row draws a label j ~ P_i. and adds (J_ij - mean_i)(J_ij - mean_i)^T. Every column draws a label i ~ Q_.j and adds its
    own term. On average over the labels, that is J^T (diag p - p p^T) J (Martens, arXiv 1412.1193).

    Args:
        batch: B pairs under a projection.
        key: seeds the draw. Give each batch its own, such as the shard's name and the batch's number in it.
        draws: labels that are drawn for each row and column; their terms are averaged.

    Returns:
        [k, k], symmetric up to rounding, loss units per squared parameter unit.
    """
    everyone = torch.arange(len(batch.logits), device=batch.logits.device).repeat(draws)
    image = draw_labels(batch.logits.softmax(1), f"{key} rows", draws)
    text = draw_labels(batch.logits.softmax(0).T, f"{key} columns", draws)
    rows = batch.entries(everyone, image) - batch.row_mean.repeat(draws, 1)
    columns = batch.entries(text, everyone) - batch.column_mean.repeat(draws, 1)
    pseudo_gradients = torch.cat([rows, columns])
    return pseudo_gradients.T @ (pseudo_gradients / draws)


def draw_labels(p: Tensor, key: str, draws: int) -> Tensor:
    """Draw labels from each row's distribution, by inversion.

    Args:
        p: [B, C] probabilities, each row's sum 1 up to rounding.
        key: seeds the draw. The same key draws the same random numbers on every machine.
        draws: labels for each row.

    Returns:
        int64 [draws * B], columns of p: all rows' first label, then all rows' second, and so on.
    """
    octets = random_bytes(key, 7 * draws * len(p)).long().view(draws, len(p), 7)
    bits = (octets << torch.arange(0, 56, 8)).sum(2) >> 3
    uniform = (bits.double() * 2.0**-53).to(p.device)  # [draws, B] in [0, 1)
    cumulative = p.double().cumsum(1)
    below = cumulative <= (uniform * cumulative[:, -1])[..., None]
    return below.sum(2).clamp_max(p.shape[1] - 1).flatten()
