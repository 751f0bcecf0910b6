"""Influence of every pair on any set of parameters of a CLIP model: all of them, the last blocks, LoRA adapters.

The heads have closed forms (`ecif.heads.influence`); for everything else forward-mode differentiation takes their place.
One target's direction is solved on Gauss-Newton products over a sample of batches, and one JVP through both towers gives
the derivatives of every Pos_n and Neg_n of a batch along it, exactly: no per-pair gradient, no random projection.

    q = (H + damping I)^-1 grad L_T,   H = sum over batches of J^T (d2L/dS2) J,   J = dS/d(parameters)
    influence_n = <grad Pos_n, q> + <grad Neg_n, q>      predicted change of the target's loss if pair n is removed

ECIF (arXiv 2411.11667) for the two parts; Forward-INF (arXiv 2402.08922) is the finite-difference, curvature-free, unsigned
cousin: it takes one ascent step on the target and looks at the change of every pair's loss.

    parameters = choose(model, ["visual.transformer.resblocks.11.*"])
    function = clip_logits(model)
    gradient = loss_gradient(function, parameters, target_batches)
    solution = solve(lambda v: gauss_newton_product(function, parameters, sample, v), gradient[None], damping=100.0)
    positive, negative = scores(function, parameters, batch, solution.directions)

A direction is one flat vector of length P over the chosen parameters, in the order of `Parameters`, as it is for the heads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ecif.losses import CLIP, Loss

Parameters = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]  # (images [B, ...], texts [B, ...]): row i of both is one pair


class Logits(NamedTuple):
    """S of a batch as a function of the parameters, in two steps: pairs one by one, then all of them with each other.

    A batch may be larger than what can be differentiated at once: with `chunk`, only so many pairs go through the towers
    together. The numbers are the same; a product costs one more forward pass.
    """

    embed: Callable[[Parameters, Batch], tuple[Tensor, Tensor]]  # a pair's text and image embedding: (u, v), each [B, d]
    similarity: Callable[[Parameters, Tensor, Tensor], Tensor]  # (u, v) -> S [B, B], row = text, column = image
    chunk: int | None = None

    def __call__(self, parameters: Parameters, batch: Batch) -> Tensor:
        """S [B, B]."""
        return self.similarity(parameters, *self.embed(parameters, batch))

    def chunks(self, batch: Batch) -> list[Batch]:
        """The batch in pieces that go through the towers together."""
        size = self.chunk or len(batch[0])
        return list(zip(batch[0].split(size), batch[1].split(size), strict=True))


class Solution(NamedTuple):
    """Directions of n targets and how far their systems were solved."""

    directions: Tensor  # [n, P] q
    residual: Tensor  # [n] |g - (H + damping I) q| / |g|, float64
    iterations: int  # Gauss-Newton products taken by the slowest system


def choose(model: nn.Module, patterns: Sequence[str]) -> Parameters:
    """The parameters whose names match one of the shell patterns, in the model's order and sharing its memory.

    Args:
        model: any module.
        patterns: such as `*`, `visual.transformer.resblocks.11.*`, `*lora*`; case matters.

    Raises:
        ValueError: no pattern, one that no parameter matches, or a parameter that is not floating point.
    """
    if not patterns:
        raise ValueError("no parameters chosen: give at least one pattern, `*` for all")
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no parameter matches {pattern!r}: names are like {', '.join(names[:1] + names[-1:])}")
    chosen = {name: p.detach() for name, p in model.named_parameters() if any(fnmatchcase(name, q) for q in patterns)}
    for name, p in chosen.items():
        if not p.is_floating_point():
            raise ValueError(f"parameter {name} is {str(p.dtype).removeprefix('torch.')}: only floating point has derivatives")
    return chosen


def split(parameters: Parameters, direction: Tensor) -> Parameters:
    """A flat direction [P] as views in the shapes of the parameters."""
    parts = direction.split([p.numel() for p in parameters.values()])
    return {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}


def flatten(parameters: Parameters) -> Tensor:
    """The flat vector [P] of tensors in the shapes of the parameters."""
    return torch.cat([p.flatten() for p in parameters.values()])


def clip_logits(model: Any, chunk: int | None = None) -> Logits:
    """S as a function of any of the parameters of an open_clip model.

    Args:
        model: with `encode_image`, `encode_text`, `logit_scale` and perhaps `logit_bias`. It is put in evaluation mode, so that
            dropout is off and BatchNorm keeps its statistics; parameters that are not chosen and buffers stay as they are.
            Gradient checkpointing has to be off: torch.func refuses it.
        chunk: pairs that go through the towers together; None for the whole batch.

    Returns:
        A function of (parameters, (pixels [B, 3, H, W] preprocessed, tokens [B, L])).
    """
    towers = _Towers(model).eval()

    def embed(parameters: Parameters, batch: Batch) -> tuple[Tensor, Tensor]:
        return functional_call(towers, {f"model.{name}": p for name, p in parameters.items()}, batch)

    def similarity(parameters: Parameters, u: Tensor, v: Tensor) -> Tensor:
        scale, bias = (parameters.get(name, getattr(model, name, None)) for name in ("logit_scale", "logit_bias"))
        return scale.exp() * u @ v.T + (0 if bias is None else bias)  # type: ignore[union-attr]

    return Logits(embed, similarity, chunk)


def loss_gradient(logits: Logits, parameters: Parameters, batches: Iterable[Batch], loss: Loss = CLIP) -> Tensor:
    """Gradient [P] of the summed batch losses (sum convention, nats) with respect to the chosen parameters."""
    total = torch.zeros_like(flatten(parameters))
    for batch in batches:
        similarity, pull_back = _vjp(logits, parameters, batch)
        total += pull_back(loss.cotangent(similarity))
    return total


def gauss_newton_product(
    logits: Logits, parameters: Parameters, batches: Iterable[Batch], directions: Tensor, loss: Loss = CLIP
) -> Tensor:
    """H directions, summed over `batches` in their order, without damping; a JVP and a VJP for each.

    Args:
        logits: S of a batch as a function of the parameters.
        parameters: the chosen ones, where the curvature is taken.
        batches: the sample that stands for the corpus. For a share f of all batches, H is this divided by f.
        directions: [n, P].
        loss: what is trained on.

    Returns:
        [n, P], loss units per squared parameter unit times direction.

    Raises:
        ValueError: no batches; a generator that an earlier product used up would otherwise pass for a flat loss.
    """
    total, batch = torch.zeros_like(directions), None
    for batch in batches:
        similarity, pull_back = _vjp(logits, parameters, batch)
        for out, direction in zip(total, directions, strict=True):
            _, tangent = _jvp(logits, parameters, batch, direction)
            out += pull_back(loss.gauss_newton_cotangent(similarity, tangent))
    if batch is None:
        raise ValueError("no batches to take the curvature on: give a list or a loader that can be read again, not a generator")
    return total


def solve(
    product: Callable[[Tensor], Tensor],
    gradients: Tensor,
    damping: float | Tensor,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
) -> Solution:
    """Conjugate gradient on (H + damping I) q = g, in a handful of vectors a system however many iterations it takes.

    `ecif.solve.krylov` takes the same product and answers every damping at once, but keeps a vector of length P for every
    iteration: the one to calibrate a damping with, on few parameters. All of a ViT-B/32 are 0.6 GB a vector.

    Args:
        product: H applied to rows, [k, P] -> [k, P] for any k <= n; symmetric, positive semi-definite.
        gradients: g of each target, [n, P].
        damping: above 0, in the units of H; one for all, or each target's own [n].
        tolerance: a system stops when |g - (H + damping I) q| <= tolerance |g| ...
        max_iterations: ... or after this many products; the residual says which.

    Raises:
        ValueError: a damping that is not above 0, a gradient that is zero or not finite.
    """
    damping = torch.as_tensor(damping).to(gradients).expand(len(gradients))[:, None]
    if not (damping > 0).all():
        raise ValueError(f"damping {damping.min():g} has to be above 0: the Gauss-Newton matrix is singular")
    norm = _norm(gradients)
    q, left, step = torch.zeros_like(gradients), gradients.clone(), gradients.clone()
    square, iterations = norm**2, 0
    while iterations < max_iterations:
        open_ = (square.sqrt() > tolerance * norm).nonzero()[:, 0]
        if not len(open_):
            break
        curved = product(step[open_]) + damping[open_] * step[open_]
        length = (square[open_] / _dot(step[open_], curved))[:, None].to(q)
        q[open_] += length * step[open_]
        left[open_] -= length * curved
        after = _dot(left[open_], left[open_])
        step[open_] = left[open_] + (after / square[open_])[:, None].to(q) * step[open_]
        square[open_] = after
        iterations += 1
    return Solution(q, square.sqrt() / norm, iterations)


def largest_eigenvalue(product: Callable[[Tensor], Tensor], gradients: Tensor, steps: int = 8) -> Tensor:
    """The unit of a relative damping: largest eigenvalue of H in the Krylov space of each target's gradient.

    Lanczos without its basis: three vectors a system. Rounding brings copies of an eigenvalue, never one that is too large.

    Args:
        product: H applied to rows, as for `solve`.
        gradients: where to start, [n, P].
        steps: products to take; a few are within percents, as the largest eigenvalue stands out.

    Returns:
        [n], float64.

    Raises:
        ValueError: a gradient that is zero or not finite.
    """
    before, beta = torch.zeros_like(gradients), gradients.new_zeros(len(gradients), 1)
    vector = gradients / _norm(gradients)[:, None].to(gradients)
    tridiagonal = torch.zeros(len(gradients), steps, steps, dtype=torch.float64)
    for m in range(steps):
        w = product(vector)
        tridiagonal[:, m, m] = _dot(w, vector)
        w = w - tridiagonal[:, m, m, None].to(w) * vector - beta * before
        beta = _dot(w, w).sqrt()[:, None].to(w)
        if m + 1 < steps:
            # An exhausted space: what is left is rounding.
            beta = beta.where(beta > 1e-6 * tridiagonal[:, m, m, None].to(w), 0.0)
            tridiagonal[:, m, m + 1] = tridiagonal[:, m + 1, m] = beta[:, 0]
            before, vector = vector, torch.where(beta > 0, w / beta, 0.0)
    return torch.linalg.eigvalsh(tridiagonal)[:, -1]


def scores(
    logits: Logits, parameters: Parameters, batch: Batch, directions: Tensor, loss: Loss = CLIP
) -> tuple[Tensor, Tensor]:
    """Both parts of the influence of every pair of a batch on every target; one JVP a target, about 3 forward passes.

    Args:
        logits: S of a batch as a function of the parameters.
        parameters: the ones the directions were solved for.
        batch: B pairs that shared a softmax.
        directions: [T, P], q of each target.
        loss: what is trained on; `Clip("taylor")` for the paper's first-order negatives.

    Returns:
        (positive, negative), each [T, B], in loss units of the target's summed loss. Their sum is the predicted change of that
        loss if the pair is removed: above 0 the pair helps, below 0 it harms.
    """
    parts = [loss.pair_derivatives(*_jvp(logits, parameters, batch, direction)) for direction in directions]
    return torch.stack([positive for positive, _ in parts]), torch.stack([negative for _, negative in parts])


class _Towers(nn.Module):
    """Both unit embeddings (u, v) of every pair, as the forward pass that `functional_call` needs."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode_text(texts, normalize=True), self.model.encode_image(images, normalize=True)


def _jvp(logits: Logits, parameters: Parameters, batch: Batch, direction: Tensor) -> tuple[Tensor, Tensor]:
    """S and its change S', each [B, B], when the parameters move along `direction` [P]."""
    moves = split(parameters, direction)
    with _differentiable():
        pieces: Any = [jvp(lambda p, b=b: logits.embed(p, b), (parameters,), (moves,)) for b in logits.chunks(batch)]
        (u, v), (du, dv) = ([torch.cat(part) for part in zip(*side, strict=True)] for side in zip(*pieces, strict=True))
        moved: Any = jvp(logits.similarity, (parameters, u, v), (moves, du, dv))
    return moved[0], moved[1]


def _vjp(logits: Logits, parameters: Parameters, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """S [B, B], and the map from a cotangent [B, B] to the gradient [P].

    A batch in one piece keeps its graph; of several, each is embedded again when it is differentiated.
    """
    chunks = logits.chunks(batch)

    def differentiate(piece: Batch) -> Any:
        return vjp(lambda p: logits.embed(p, piece), parameters)

    with _differentiable():
        kept = differentiate(batch) if len(chunks) == 1 else None
        embedded = [kept[0]] if kept else [logits.embed(parameters, piece) for piece in chunks]
        u, v = (torch.cat(part) for part in zip(*embedded, strict=True))
        pulled: Any = vjp(logits.similarity, parameters, u, v)

    def gradient(cotangent: Tensor) -> Tensor:
        with _differentiable():
            own, du, dv = pulled[1](cotangent)
            total = flatten(own)
            for piece, *moves in zip(chunks, du.split(len(chunks[0][0])), dv.split(len(chunks[0][0])), strict=True):
                pull_back = (kept or differentiate(piece))[1]
                total += flatten(pull_back(tuple(moves))[0])
            return total

    return pulled[0], gradient


@contextmanager
def _differentiable() -> Iterator[None]:
    """Plain attention, as the fused forms have no forward-mode derivative, and no graph for parameters that are not chosen."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [n] of rows, summed in float64."""
    return (a * b).sum(1, dtype=torch.float64)


def _norm(gradients: Tensor) -> Tensor:
    """|g| [n] in float64, of gradients that ask something."""
    norm = _dot(gradients, gradients).sqrt()
    if not (norm.isfinite() & (norm > 0)).all():
        raise ValueError("a target's gradient is zero or not finite: its loss does not depend on the chosen parameters")
    return norm
