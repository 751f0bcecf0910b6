"""Features like those of a pre-trained CLIP: seeded, of any size, without a download.

A pair has a latent meaning. Each tower sees it with as much noise of its own, adds the constant of its modality (the cone and
the gap between modalities of Liang et al., "Mind the gap", arXiv 2203.02053), and its trunk holds the sum in a basis with a
falling spectrum, beside directions that the checkpoint's head throws away. The checkpoint's heads recover the embeddings, a
little off: a user's corpus is never quite what a checkpoint was trained on. They are about as good as heads can be at logit
scale 100, so a fit has little to gain and much to lose, as with a real one.

| 768 x 512, 4,096 pairs (`statistics`) | published CLIPs | here |
|---|---|---|
| cosine of a right pair | 0.25 to 0.35 (ViT-B/32; LAION-400M kept pairs above 0.3) | 0.31 |
| cosine of a wrong pair | 0.1 to 0.25 | 0.21, standard deviation 0.02 |
| mean cosine of two images / of two texts | 0.47 / 0.51 (Liang et al., a ViT and a text transformer) | 0.55 / 0.54 |
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecif.heads import Heads, embed

CONE = 1.1  # length of a modality's constant, beside a meaning of length 1
GAP = 0.4  # cosine of both modalities' constants
NOISE = 1.9  # of each tower, beside a meaning of 1
SPECTRUM = 0.1  # standard deviation of latent dimension i falls as i^-SPECTRUM
TRUNK = 0.25  # the same, of the trunk's basis
HIDDEN = 1.0  # length of what the head throws away, beside what it keeps
OFF = 0.05  # how far the checkpoint's heads are from those that recover the embeddings


class ClipLike(NamedTuple):
    """Features of N pairs, and the heads of the checkpoint."""

    images: Tensor  # [N, features] unit length, float32
    texts: Tensor  # [N, features]
    wrong: Tensor  # [N] bool: the pair has the caption of another one
    heads: Heads  # [features, embedding] each, logit scale 100


def clip_like(
    pairs: int, wrong: float = 0.2, features: int = 768, embedding: int = 512, seed: int = 0, noise: float = NOISE
) -> ClipLike:
    """Draw pairs of one world; the same `features`, `embedding`, `noise` and `seed` have the same checkpoint.

    Args:
        pairs: how many.
        wrong: share of pairs whose captions are swapped among them.
        features: size of both trunks' features, above `embedding`.
        embedding: size of the embeddings.
        seed: of everything.
        noise: of each tower; heads with fewer dimensions need less for pairs that can be matched.
    """
    g = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, embedding + 1) ** -SPECTRUM
    scales = scales / scales.norm()
    rotation = _orthogonal(embedding, g)
    first, second = normalize(torch.randn(2, embedding, generator=g), dim=1)
    second = GAP * first + math.sqrt(1 - GAP**2) * normalize(second - (second @ first) * first, dim=0)
    plane = torch.linalg.qr(torch.stack([first, second], 1))[0]
    meaning, sides, heads = torch.randn(pairs, embedding, generator=g), [], []
    for constant in (first, second):
        basis, mixing = _orthogonal(features, g), _orthogonal(embedding, g)
        spectrum = torch.arange(1, embedding + 1) ** -TRUNK
        seen = meaning + noise * torch.randn(pairs, embedding, generator=g)
        embedded = (seen / math.sqrt(1 + noise**2) * scales) @ rotation
        embedded = CONE * constant + embedded - (embedded @ plane) @ plane.T
        kept = embedded @ (mixing * spectrum) @ basis[:embedding]
        hidden = torch.randn(pairs, features - embedding, generator=g) @ basis[embedding:]
        sides.append(normalize(kept + HIDDEN * hidden * kept.norm() / hidden.norm(), dim=1))
        head = basis[:embedding].T @ (mixing / spectrum).T
        error = torch.randn(features, embedding, generator=g)
        heads.append(head + OFF * error * head.norm() / error.norm())
    bad = torch.randperm(pairs, generator=g)[: round(wrong * pairs)]
    sides[1][bad] = sides[1][bad.roll(1)]
    mask = torch.zeros(pairs, dtype=torch.bool)
    mask[bad] = True
    return ClipLike(sides[0], sides[1], mask, Heads(heads[0], heads[1], 100.0))


def statistics(drawn: ClipLike) -> dict[str, float]:
    """Mean cosines under the checkpoint, of up to 1,000 right pairs."""
    rows = (~drawn.wrong).nonzero()[:1000, 0]
    pairs = embed(drawn.heads, drawn.images[rows], drawn.texts[rows])
    others = ~torch.eye(len(rows), dtype=torch.bool)
    cosine, images, texts = pairs.u @ pairs.v.T, pairs.v @ pairs.v.T, pairs.u @ pairs.u.T
    return {
        "right pairs": cosine.diagonal().mean().item(),
        "wrong pairs": cosine[others].mean().item(),
        "wrong pairs, spread": cosine[others].std().item(),
        "two images": images[others].mean().item(),
        "two texts": texts[others].mean().item(),
    }


def _orthogonal(size: int, g: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=g))[0]
