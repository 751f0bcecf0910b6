"""Do an image and its caption have the same neighbours?

Pairs whose images are alike should have captions that are alike. Both sides of a pair name their neighbours in a bank of other
pairs of the corpus, each within its own modality, as in stochastic neighbour embedding (Hinton & Roweis, 2002):

    a_nm = softmax_m(s_x <x_n, x_m>),   b_nm = softmax_m(s_t <t_n, t_m>),   agreement_n = log( M sum_m a_nm b_nm )

the log of how many times likelier than chance both name the same pair. Comparing two modalities by their similarities to known
pairs is ASIF's idea (Norelli et al., arXiv 2210.01738). Features are enough: no head, no fit, and nothing that a fit could
memorise. x and t are centred on the bank and have unit length; a pair never meets the bank's pairs of its own fold.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

NEIGHBOURS = 30.0  # perplexity of an image's or a caption's neighbours, the median over the bank
PROBES = 512  # pairs of the bank that it is measured on
CHUNK = 1024  # pairs that meet the bank at once


class Bank(NamedTuple):
    """Known pairs."""

    images: Tensor  # [M, d_x] float16, centred, unit length
    texts: Tensor  # [M, d_t] alike
    image_centre: Tensor  # [d_x] float32
    text_centre: Tensor  # [d_t]
    fold: Tensor  # [M]
    sharpness: Tensor  # [2] float64: s_x, s_t

    def to(self, device: torch.device | str) -> "Bank":
        """The same bank on another device."""
        return Bank(*(part.to(device) for part in self))

    def agreement(self, images: Tensor, texts: Tensor, fold: Tensor) -> Tensor:
        """[N] float32, nats: 0 is chance, high is good.

        Args:
            images: [N, d_x] features.
            texts: [N, d_t] features.
            fold: [N] of each pair; 0 for a pair whose fold has every pair of the bank.
        """
        parts = zip(images.split(CHUNK), texts.split(CHUNK), fold.split(CHUNK), strict=True)
        found = [self._agreement(*part) for part in parts]
        return torch.cat(found) if found else images.new_zeros(0)

    def _agreement(self, images: Tensor, texts: Tensor, fold: Tensor) -> Tensor:
        own = fold[:, None] == self.fold[None]
        sides = [(images, self.image_centre, self.images), (texts, self.text_centre, self.texts)]
        named = 0.0
        for (features, centre, known), sharpness in zip(sides, self.sharpness.tolist(), strict=True):
            likeness = sharpness * (normalize(features - centre, dim=1) @ known.float().T)
            named = named + likeness.masked_fill(own, -torch.inf).log_softmax(1)
        others = (~own).sum(1)
        return (torch.as_tensor(named).logsumexp(1) + others.log()).where(others > 0, 0.0)


def build(images: Tensor, texts: Tensor, fold: Tensor) -> Bank:
    """A bank of pairs, so sharp that a typical image or caption has NEIGHBOURS of them, or a quarter where they are few.

    Args:
        images: [M, d_x] float32 features.
        texts: [M, d_t] alike.
        fold: [M] of each pair.
    """
    sides, sharpness = [], []
    for features in (images, texts):
        centre = features.mean(0)
        unit = normalize(features - centre, dim=1).half()
        likeness = (unit[:PROBES].float() @ unit.float().T).masked_fill(fold[:PROBES, None] == fold[None], -torch.inf)
        low, high = -5.0, 10.0  # of its logarithm
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if _perplexity(likeness * 2**middle) > min(NEIGHBOURS, len(fold) / 4) else (low, middle)
        sides.append((unit, centre))
        sharpness.append(2**low)
    (known_images, image_centre), (known_texts, text_centre) = sides
    exact = torch.tensor(sharpness, dtype=torch.float64, device=images.device)
    return Bank(known_images, known_texts, image_centre, text_centre, fold, exact)


def _perplexity(logits: Tensor) -> float:
    """Median over rows of how many columns the softmax names."""
    p = logits.softmax(1)
    return (-torch.special.xlogy(p, p).sum(1)).exp().nanmedian().item()
