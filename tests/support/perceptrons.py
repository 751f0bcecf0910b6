"""A contrastive model of two small perceptrons: its matrices can be written out, and autograd is the truth, in float64."""

import torch
from torch.func import hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from ecif.forward.mode import Logits, flatten, gauss_newton_product, loss_gradient, split
from ecif.losses.contrastive import batch_loss
from tests.support.problems import slow_loss, without


def randn(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_layers(parameters, batch):
    """Unit embeddings (u, v) of a batch."""
    v = torch.tanh(batch[0] @ parameters["image_in"]) @ parameters["image_out"]
    u = torch.tanh(batch[1] @ parameters["text_in"]) @ parameters["text_out"]
    return u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)


perceptrons = Logits(two_layers, lambda parameters, u, v: parameters["logit_scale"].exp() * u @ v.T)

SHAPES = {"image_in": (5, 4), "image_out": (4, 3), "logit_scale": (), "text_in": (6, 4), "text_out": (4, 3)}
PERCEPTRONS = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
LATENT = randn(30, 3, seed=20)
IMAGES, TEXTS = LATENT @ randn(3, 5, seed=21), LATENT @ randn(3, 6, seed=22) + 0.5 * randn(30, 6, seed=23)
BATCHES = [(IMAGES[rows], TEXTS[rows]) for rows in torch.arange(18).split(6)]
TARGETS = [[(IMAGES[18:24], TEXTS[18:24])], [(IMAGES[24:], TEXTS[24:]), (IMAGES[18:22], TEXTS[18:22])]]


def product(directions):
    """H directions [n, P] of the perceptrons' sample."""
    return gauss_newton_product(perceptrons, PERCEPTRONS, BATCHES, directions)


def target_gradients():
    """[2, P], one for each of the perceptrons' targets."""
    return torch.stack([loss_gradient(perceptrons, PERCEPTRONS, target) for target in TARGETS])


def of_flat(function, parameters, batch):
    """The logits as a function of one flat vector, for autograd."""
    return lambda w: function(split(parameters, w), batch)


def slow_pair(s, n, kind):
    """(Pos_n, Neg_n) from the definition."""
    positive = s[n].logsumexp(0) + s[:, n].logsumexp(0) - 2 * s[n, n]
    others = torch.arange(len(s)) != n
    taylor = s.softmax(1)[others, n].sum() + s.softmax(0)[n, others].sum()
    return positive, taylor if kind == "taylor" else batch_loss(s) - batch_loss(without(s, n)) - positive


def slow_pair_gradients(function, parameters, batch, kind):
    """Every pair's two gradients [B, P] by an autograd loop."""
    w = flatten(parameters).requires_grad_()
    s = of_flat(function, parameters, batch)(w)
    parts = [slow_pair(s, n, kind) for n in range(len(s))]
    return [torch.stack([torch.autograd.grad(p, w, retain_graph=True)[0] for p in part]) for part in zip(*parts, strict=True)]


def explicit_gauss_newton(function, parameters, batches):
    """H [P, P], written out."""
    total = 0
    for batch in batches:
        f = of_flat(function, parameters, batch)
        s = f(flatten(parameters))
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = jacrev(f)(flatten(parameters)).reshape(s.numel(), -1)
        total = total + jacobian.T @ hessian(slow_loss)(s).reshape(s.numel(), s.numel()) @ jacobian
    return total
