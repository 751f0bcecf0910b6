"""How good scores are, against truths: real refits, known misaligned pairs, a test set."""

import torch
from torch import Tensor

from ecif.heads import Heads, embed, logits
from ecif.losses import CLIP, Loss
from ecif.losses.contrastive import batch_loss


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0 along the last dimension, ties averaged, float64."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    ties = (values[..., None, :] == values[..., :, None]).sum(-1)
    return below + (ties - 1) / 2.0


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation along the last dimension; NaN where one side is constant."""
    a, b = ranks(a).double(), ranks(b).double()
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def linear_datamodeling_score(influence: Tensor, removed: Tensor, losses: Tensor) -> float:
    """Agreement of summed influence with what refits without those pairs really do (LDS; TRAK, arXiv 2303.14186).

    Args:
        influence: [G, N] of every pair on each of G target groups.
        removed: [R, N] bool, the pairs that each refit went without.
        losses: [R, G] the groups' losses after each refit.

    Returns:
        Mean over the groups of the Spearman correlation between predicted and true losses over the R refits.
    """
    predicted = influence.double() @ removed.double().T  # [G, R]
    return spearman(predicted, losses.T).nanmean().item()


def auroc(badness: Tensor, bad: Tensor) -> float:
    """Probability that a bad pair is ranked worse than a good one; badness [N], bad [N] bool; NaN where all are bad or none."""
    order = badness.double().sort()
    _, inverse, counts = order.values.unique_consecutive(return_inverse=True, return_counts=True)
    average_rank = (counts.cumsum(0) - (counts - 1) / 2.0)[inverse]
    positives = bad[order.indices]
    n_bad, n_good = int(bad.sum()), int((~bad).sum())
    return ((average_rank[positives].sum() - n_bad * (n_bad + 1) / 2) / (n_bad * n_good)).item()


def precision_at(badness: Tensor, bad: Tensor, k: int) -> float:
    """Share of really bad pairs among the k that are ranked worst; badness [N], bad [N] bool."""
    return bad[badness.argsort(descending=True, stable=True)[:k]].double().mean().item()


def target_losses(heads: Heads, images: Tensor, texts: Tensor, groups: list[Tensor], loss: Loss = CLIP) -> Tensor:
    """[G] loss of each group of target pairs, in its units (nats; sum convention), a group a batch.

    Args:
        heads: the heads.
        images: features [N, d_x].
        texts: features [N, d_t].
        groups: rows of each, int64.
        loss: of a batch.
    """
    return torch.stack([loss.batch_loss(logits(heads, embed(heads, images[g], texts[g]))) for g in groups])


def retrieval_recall(heads: Heads, images: Tensor, texts: Tensor, k: int) -> float:
    """R@k, 0 to 1: how often the partner is among the k nearest, mean of text-to-image and image-to-text. Ties count against.

    Args:
        heads: the heads.
        images: features [N, d_x], pair n with
        texts: features [N, d_t].
        k: how many of the N candidates are looked at.
    """
    similarity = logits(heads, embed(heads, images, texts))
    own = similarity.diagonal()
    text_to_image = (similarity >= own[:, None]).sum(1) <= k
    image_to_text = (similarity >= own[None, :]).sum(0) <= k
    return (text_to_image.double().mean() + image_to_text.double().mean()).item() / 2


def calibrated_loss(
    heads: Heads, images: Tensor, texts: Tensor, scales: tuple[float, ...] = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0)
) -> float:
    """CLIP's loss per pair of images [N, d_x] and texts [N, d_t] (nats, open_clip's convention, one batch of all) at the best
    of a few temperatures.

    A measure of ranking, the same whatever loss the heads were trained with.

    The temperature is calibrated because a change of confidence would otherwise drown the change of ranking.
    """
    similarity = logits(heads, embed(heads, images, texts))
    return min(batch_loss(similarity * scale).item() for scale in scales) / (2 * len(similarity))
