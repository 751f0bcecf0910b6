"""Influence of every pair on any set of parameters of a CLIP model: all of them, the last blocks, LoRA adapters.

The heads have closed forms (`ecif.heads.influence`). For all other parameters, forward-mode differentiation takes their place.
For each target, a direction q is solved with Gauss-Newton products over a sample of batches. One JVP through both towers along
q then gives the exact derivatives of every Pos_n and Neg_n of a batch. No per-pair gradient and no random projection is needed.

    q = (H + damping I)^-1 grad L_T,   H = sum over batches of J^T (d2L/dS2) J,   J = dS/d(parameters)
    influence_n = <grad Pos_n, q> + <grad Neg_n, q>      predicted change of the target's loss if pair n is removed

The two parts are those of ECIF (arXiv 2411.11667). Forward-INF (arXiv 2402.08922) is related: it takes one ascent step on the
target and looks at the change of every pair's loss. That is a finite difference, without curvature and without a sign.

    parameters = choose_parameters(model, ["visual.transformer.resblocks.11.*"])
    function = clip_logits(model)
    gradient = loss_gradient(function, parameters, target_batches)
    product = lambda v: gauss_newton_product(function, parameters, sample, v)
    solution = ecif.solve.conjugate_gradient(product, gradient[None], damping=100.0)
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
    """S of a batch as a function of the parameters, in two steps: each pair is embedded, then all are compared with each other.

    A batch may need more memory than there is to differentiate it at once. With `chunk`, only that many pairs go through the
    towers together. The numbers stay the same, and a product costs one more forward pass.
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


def choose_parameters(model: nn.Module, patterns: Sequence[str]) -> Parameters:
    """The parameters whose names match one of the shell patterns, in the model's order and sharing its memory.

    Args:
        model: any module.
        patterns: such as `*`, `visual.transformer.resblocks.11.*`, `*lora*`; case matters.

    Raises:
        ValueError: there is no pattern, a pattern matches no parameter, or a parameter is not floating point.
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
    """The flat vector [P] of all parameters, or of other tensors in their shapes."""
    return torch.cat([p.flatten() for p in parameters.values()])


def clip_logits(model: Any, chunk: int | None = None) -> Logits:
    """S as a function of any of the parameters of an open_clip model.

    Args:
        model: a module with `encode_image`, `encode_text`, `logit_scale` and perhaps `logit_bias`. It is put in evaluation
            mode, so that dropout is off and BatchNorm keeps its statistics. Buffers, and parameters that are not chosen, keep
            their values. Gradient checkpointing has to be off, because torch.func refuses it.
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
    """H directions, summed over `batches` in their order, without damping. Each direction and batch takes a JVP and a VJP.

    Args:
        logits: S of a batch as a function of the parameters.
        parameters: the chosen parameters, at which the curvature is taken.
        batches: the sample that stands for the corpus. If it is a share f of all batches, divide by f for the corpus's H.
        directions: [n, P].
        loss: the training loss.

    Returns:
        [n, P], loss units per squared parameter unit times direction.

    Raises:
        ValueError: there are no batches, for example because an earlier product has used up a generator.
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


def scores(
    logits: Logits, parameters: Parameters, batch: Batch, directions: Tensor, loss: Loss = CLIP
) -> tuple[Tensor, Tensor]:
    """Both parts of the influence of every pair of a batch on every target: one JVP for each target, about 3 forward passes.

    Args:
        logits: S of a batch as a function of the parameters.
        parameters: the parameters that the directions were solved for.
        batch: B pairs that shared a softmax.
        directions: [T, P], q of each target.
        loss: the training loss; `Clip("taylor")` for the paper's first-order negatives.

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
    """S and its derivative S', each [B, B], along a `direction` [P] of the parameters."""
    moves = split(parameters, direction)
    with _differentiable():
        pieces: Any = [jvp(lambda p, b=b: logits.embed(p, b), (parameters,), (moves,)) for b in logits.chunks(batch)]
        (u, v), (du, dv) = ([torch.cat(part) for part in zip(*side, strict=True)] for side in zip(*pieces, strict=True))
        moved: Any = jvp(logits.similarity, (parameters, u, v), (moves, du, dv))
    return moved[0], moved[1]


def _vjp(logits: Logits, parameters: Parameters, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """S [B, B], and the map from a cotangent [B, B] to the gradient [P].

    A batch that goes through the towers in one piece keeps its graph. A batch in several chunks is embedded again, chunk by
    chunk, when the gradient is taken.
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
    """Use plain attention, as the fused kernels have no forward-mode derivative, and build no graph for other parameters."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
