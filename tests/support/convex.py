"""A contrastive model that can be trained again without each pair, as every training ends in its one minimum.

S_ij = t_i^T W x_j is linear in W, so the ridge-regularised InfoNCE is convex. A few captions are swapped.
"""

import torch
from torch.func import grad, hessian

from ecif.losses.contrastive import batch_loss

TRAIN, HELD_OUT, D_IMAGE, D_TEXT, DAMPING = 48, 24, 7, 6, 1.0


def make_problem():
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    latent = randn(TRAIN + HELD_OUT, 5)
    images = torch.tanh(latent @ randn(5, D_IMAGE)) + 0.3 * randn(TRAIN + HELD_OUT, D_IMAGE)
    texts = torch.tanh(latent @ randn(5, D_TEXT)) + 0.3 * randn(TRAIN + HELD_OUT, D_TEXT)
    swapped = torch.randperm(TRAIN, generator=g)[:9]
    texts[swapped] = texts[swapped.roll(1)]
    return images, texts, list(torch.randperm(TRAIN, generator=g).split(16))


IMAGES, TEXTS, BATCHES = make_problem()
CLEAN = torch.arange(TRAIN, TRAIN + HELD_OUT)


def logits(w, rows):
    return TEXTS[rows] @ w.view(D_TEXT, D_IMAGE) @ IMAGES[rows].T


def objective(w, batches):
    return sum(batch_loss(logits(w, b)) for b in batches) + DAMPING / 2 * w @ w


def train(batches, w):
    for _ in range(100):  # damped Newton
        g = grad(objective)(w, batches)
        if g.norm() < 1e-9:
            return w
        step, scale, before = torch.linalg.solve(hessian(objective)(w, batches), g), 1.0, objective(w, batches)
        while objective(w - scale * step, batches) > before + 1e-12:
            scale /= 2
        w = w - scale * step
    raise AssertionError("the convex problem was not solved")
