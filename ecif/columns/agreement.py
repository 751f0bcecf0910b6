"""Do an image and its caption have the same neighbours?

Pairs with similar images should have similar captions. For each pair, the image defines a distribution over its neighbours in a
bank of other pairs of the corpus, and so does the caption. Each compares features of its own modality only, as in stochastic
neighbour embedding (Hinton & Roweis, 2002):

    a_nm = softmax_m(s_x <x_n, x_m>),   b_nm = softmax_m(s_t <t_n, t_m>),   agreement_n = log( M sum_m a_nm b_nm )

M is the number of the bank's pairs outside the pair's own fold. Draw one neighbour from each distribution: the score is the log
of how many times likelier than chance both are the same pair. ASIF also compares two modalities by their similarity to known
pairs (Norelli et al., arXiv 2210.01738). The score uses trunk features only. Without heads and a fit, nothing is memorised.

The pairs of a target are another bank. They are known to be right, so they tell more of the pairs that the target asks about.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecif.columns.bank import Bank
from ecif.columns.contract import Column, HeldOutPairs, PairScore

CHUNK = 256  # pairs that are compared with the bank at once


class Agreement(PairScore, name="agreement"):
    """How much likelier than chance a pair's image and caption name the same neighbour."""

    good = "high"
    unit = "nats"
    says = "Log of how many times likelier than chance image and caption name the same neighbour in the corpus; 0 is chance."
    evidence = True

    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] agreement of every pair with the bank."""
        return agreement_with(pairs.bank, pairs.images, pairs.texts, pairs.fold)


def agreement_with(bank: Bank, images: Tensor, texts: Tensor, fold: Tensor) -> Tensor:
    """Agreement [N] of every pair, float32, in nats: 0 is chance, high is good.

    Args:
        bank: the pairs among which neighbours are found.
        images: [N, d_x] features.
        texts: [N, d_t] features.
        fold: [N] fold of each pair. A pair whose fold holds the whole bank gets 0.
    """
    found = images.new_zeros(len(images), dtype=_at_least_single(images))
    for f in fold.unique().tolist():
        mine, others = fold == f, bank.fold != f
        if others.any():
            found[mine] = _agreement(_log_sums(bank.among(others), images[mine], texts[mine]), others.sum())
    return found


def agreement_with_target(bank: Bank, images: Tensor, texts: Tensor, without: Sequence[int] = (-1,)) -> Tensor:
    """Agreement [W, N] of every pair with the pairs of a target, float32, in nats.

    Args:
        bank: the target's pairs; the fold of each is its part of the target (`ecif.targets.question`).
        images: [N, d_x] features; half precision is computed in float32.
        texts: [N, d_t] features.
        without: the parts that have no say, one at a time; -1 asks all. Centre and sharpness stay those of the whole target.
    """
    parts = bank.fold.unique()
    sums = torch.stack([_log_sums(bank.among(bank.fold == part), images, texts) for part in parts], 1)
    found = []
    for left_out in without:
        others = parts != left_out
        count = (bank.fold != left_out).sum()
        found.append(_agreement(sums[:, others].logsumexp(1), count) if others.any() else torch.zeros_like(sums[0, 0]))
    return torch.stack(found)


def agreement_column(target: str) -> Column:
    """The column of a pair's agreement with a target."""
    return Column(
        f"agreement_{target}",
        "high",
        "nats",
        "Log of how many times likelier than chance image and caption name the same pair of the target; 0 is chance.",
    )


def _agreement(log_sums: Tensor, others: Tensor) -> Tensor:
    """[N] from `_log_sums` over a number of pairs."""
    image, text, both = log_sums
    return both - image - text + others.log()


def _log_sums(bank: Bank, images: Tensor, texts: Tensor) -> Tensor:
    """[3, N] float32: log of the sums over the bank of e^(s_x <x_n, x_m>), of e^(s_t <t_n, t_m>), and of their products."""
    sharp_x, sharp_t = bank.sharpness.tolist()
    images, texts = (side.to(_at_least_single(side)) for side in (images, texts))
    found = []
    for x, t in zip(images.split(CHUNK), texts.split(CHUNK), strict=True):
        by_image, by_text = sharp_x * bank.image_cosine(x), sharp_t * bank.text_cosine(t)
        image, text = by_image.logsumexp(1), by_text.logsumexp(1)
        found.append(torch.stack([image, text, by_image.add_(by_text).logsumexp(1)]))
    return torch.cat(found, 1)


def _at_least_single(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)
