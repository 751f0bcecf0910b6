"""Measures of how good scores are, against a truth: real refits, pairs known to be misaligned, or a test set."""

import torch
from torch import Tensor

from ecif.heads import Heads, embed, logits
from ecif.losses.contrastive import batch_loss
from ecif.temperature import best_temperature


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0 along the last dimension, ties averaged, float64."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    ties = (values[..., None, :] == values[..., :, None]).sum(-1)
    return below + (ties - 1) / 2.0


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation along the last dimension; NaN if one side is constant."""
    a, b = ranks(a).double(), ranks(b).double()
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def linear_datamodeling_score(influence: Tensor, removed: Tensor, losses: Tensor) -> float:
    """Linear datamodeling score (LDS; TRAK, arXiv 2303.14186): does summed influence rank the outcomes of real refits?

    Args:
        influence: [G, N] influence of every pair on each of G target groups.
        removed: [R, N] bool, the pairs that each refit left out.
        losses: [R, G] losses of the groups after each refit.

    Returns:
        Mean over the groups of the Spearman correlation between predicted and true losses over the R refits.
    """
    predicted = influence.double() @ removed.double().T  # [G, R]
    return spearman(predicted, losses.T).nanmean().item()


def auroc(badness: Tensor, bad: Tensor) -> float:
    """The probability that a bad pair is ranked worse than a good one, ties counted half.

    Args:
        badness: [N], larger is worse.
        bad: [N] bool.

    Returns:
        0 to 1; NaN if all pairs are bad or none is.
    """
    order = badness.double().sort()
    _, inverse, counts = order.values.unique_consecutive(return_inverse=True, return_counts=True)
    average_rank = (counts.cumsum(0) - (counts - 1) / 2.0)[inverse]
    positives = bad[order.indices]
    n_bad, n_good = int(bad.sum()), int((~bad).sum())
    return ((average_rank[positives].sum() - n_bad * (n_bad + 1) / 2) / (n_bad * n_good)).item()


def precision_at(badness: Tensor, bad: Tensor, k: int) -> float:
    """The share of bad pairs among the k that are ranked worst, from badness [N] and bad [N] bool."""
    return bad[badness.argsort(descending=True, stable=True)[:k]].double().mean().item()


def retrieval_recall(heads: Heads, images: Tensor, texts: Tensor, k: int) -> float:
    """R@k: the share of pairs whose partner is among the k nearest, mean of text-to-image and image-to-text retrieval.

    Args:
        heads: the heads that pairs are embedded with.
        images: features [N, d_x].
        texts: features [N, d_t]; row n belongs to image n.
        k: how many of the N candidates count as nearest.

    Returns:
        0 to 1. A partner with the same similarity as other candidates is ranked behind them.
    """
    similarity = logits(heads, embed(heads, images, texts))
    own = similarity.diagonal()
    text_to_image = (similarity >= own[:, None]).sum(1) <= k
    image_to_text = (similarity >= own[None, :]).sum(0) <= k
    return (text_to_image.double().mean() + image_to_text.double().mean()).item() / 2


def calibrated_loss(heads: Heads, images: Tensor, texts: Tensor) -> float:
    """CLIP's loss per pair at its best temperature.

    The minimum over the temperature is taken so that becoming merely more or less confident does not change the loss. The rest
    measures ranking, also for heads that were trained with another loss.

    Args:
        heads: the heads that pairs are embedded with.
        images: features [N, d_x].
        texts: features [N, d_t]; row n belongs to image n. All N pairs are one batch.

    Returns:
        Nats, in the convention of open_clip's ClipLoss.
    """
    return loss_at_best_temperature(logits(heads, embed(heads, images, texts)))


def loss_at_best_temperature(similarity: Tensor) -> float:
    """CLIP's loss per pair in nats, given logits [N, N] with rows of texts, at the temperature at which it is smallest."""
    similarity = similarity.double()
    with torch.enable_grad():
        tau = best_temperature(lambda tau: batch_loss(tau * similarity))
    return batch_loss(tau * similarity).item() / (2 * len(similarity))
