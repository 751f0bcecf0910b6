"""Small problems on which every formula can be checked against a slow truth, in float64."""

from typing import Any

import torch
from torch import Tensor

from ecif.columns import HeldOutPairs
from ecif.columns.bank import build_bank
from ecif.heads import Heads
from ecif.heads.fit import Course, Epoch, fit
from ecif.losses import CLIP, Loss

D_IMAGE, D_TEXT, WIDTH = 7, 6, 5


def random_heads(seed: int = 0, scale: float = 4.0) -> Heads:
    g = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(d, WIDTH, generator=g, dtype=torch.float64) for d in (D_IMAGE, D_TEXT))
    return Heads(image, text, scale)


def random_features(pairs: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(pairs, 4, generator=g, dtype=torch.float64)
    images, texts = (shared @ torch.randn(4, d, generator=g, dtype=torch.float64) for d in (D_IMAGE, D_TEXT))
    noise = (0.3 * torch.randn(pairs, d, generator=g, dtype=torch.float64) for d in (D_IMAGE, D_TEXT))
    return images + next(noise), texts + next(noise)


def fit_one(
    start: Heads, images: Tensor, texts: Tensor, epoch: Epoch, *, seed: int, pull: float = 0.0, **how: Any
) -> list[Heads]:
    """The path of a fit by itself."""
    return fit(start, images, texts, [Course(epoch, seed, pull)], **how)[0]


def flat(heads: Heads) -> Tensor:
    return torch.cat([heads.image.flatten(), heads.text.flatten()])


def slow_logits(heads: Heads, weights: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """S written out pair by pair, as a function of the flat parameters, so that autograd can differentiate it."""
    image, text = heads.split(weights)
    rows = []
    for t in texts:
        z = t @ text
        u = z / z.norm()
        rows.append(torch.stack([heads.logit_scale * (u @ (x @ image)) / (x @ image).norm() for x in images]))
    return torch.stack(rows)


def slow_loss(s: Tensor) -> Tensor:
    """The batch loss, term by term."""
    n = len(s)
    rows = sum(torch.log(torch.exp(s[i]).sum()) - s[i, i] for i in range(n))
    columns = sum(torch.log(torch.exp(s[:, j]).sum()) - s[j, j] for j in range(n))
    return torch.as_tensor(rows + columns)


def without(s: Tensor, n: int) -> Tensor:
    """S without row and column n."""
    kept = [i for i in range(len(s)) if i != n]
    return s[kept][:, kept]


def held_out_pairs(pairs: int = 12, folds: int = 3, loss: Loss = CLIP) -> HeldOutPairs:
    """Pairs with unit features in two rounds of batches; pair 0 is in the first round only. Two seeds of fitted heads."""
    g = torch.Generator().manual_seed(3)
    images, texts = (features / features.norm(dim=1, keepdim=True) for features in random_features(pairs))
    fold = torch.randperm(pairs, generator=g) % folds
    batches = [*torch.randperm(pairs, generator=g).split(5), *(1 + torch.randperm(pairs - 1, generator=g)).split(4)]
    target = torch.randn(9, D_IMAGE, generator=g, dtype=torch.float64)
    target = target / target.norm(dim=1, keepdim=True)
    bank = build_bank(images, texts, fold, random_heads())
    fitted = [random_heads(seed) for seed in (7, 8)]
    return HeldOutPairs(images, texts, fold, batches, random_heads(), fitted, loss, bank, target)
