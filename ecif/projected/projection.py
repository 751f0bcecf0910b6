"""Project gradients of both heads to few numbers, with one Kronecker pair for each head: random, PCA, or the identity."""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.heads import Embedded, Heads, embed

Rank = tuple[int, int]  # (ki, ko): dimensions that features and embeddings are projected to


class Factors(NamedTuple):
    """The Kronecker pair of one head: a gradient G [d_x, d] becomes A^T G C [ki, ko]."""

    features: Tensor  # A [d_x, ki]
    embedding: Tensor  # C [d, ko]

    def apply(self, gradients: Tensor) -> Tensor:
        """Project gradients of the head [n, d_x, d] to [n, ki ko]."""
        return (self.features.T @ gradients @ self.embedding).flatten(1)


class Projection(NamedTuple):
    """R: directions of both heads [P] to k = k_image + k_text numbers, image head first."""

    image: Factors
    text: Factors

    @property
    def size(self) -> int:
        """k, the sum over both heads."""
        return sum(f.features.shape[1] * f.embedding.shape[1] for f in self)

    def to(self, like: Tensor) -> "Projection":
        """The same projection in the dtype and on the device of `like`."""
        return Projection(*(Factors(*(part.to(like) for part in factors)) for factors in self))

    def apply(self, heads: Heads, directions: Tensor) -> Tensor:
        """Project directions [n, P], such as a target's gradient, to [n, k]."""
        image, text = directions.split([heads.image.numel(), heads.text.numel()], dim=1)
        return torch.cat(
            [self.image.apply(image.view(-1, *heads.image.shape)), self.text.apply(text.view(-1, *heads.text.shape))], dim=1
        )


def identity_projection(heads: Heads) -> Projection:
    """Full rank: the exact gradients, in the layout of a direction [P]."""
    return Projection(*(Factors(*(torch.eye(n, dtype=w.dtype, device=w.device) for n in w.shape)) for w in heads[:2]))


def random_projection(heads: Heads, image: Rank, text: Rank, seed: int) -> Projection:
    """Random signs (Rademacher), divided by the square root of the rank. Inner products are unbiased: E <R g, R h> = <g, h>.

    The signs are the bits of SHAKE-256 (FIPS 202) of the seed and the factor's name, so that every machine, device and library
    version draws the same bytes.

    Args:
        heads: heads with the shapes, dtype and device of the projection.
        image: (ki, ko) of the image head.
        text: (ki, ko) of the text head.
        seed: of the draw.

    Raises:
        ValueError: a rank below 1 or above what it projects from.
    """
    _check_ranks(heads, image, text)

    def factors(head: str, weight: Tensor, rank: Rank) -> Factors:
        names = ("features", "embedding")
        signs = (_signs(f"{seed} {head} {name}", rows, k) for name, rows, k in zip(names, weight.shape, rank, strict=True))
        return Factors(*((sign / math.sqrt(sign.shape[1])).to(weight) for sign in signs))

    return Projection(factors("image", heads.image, image), factors("text", heads.text, text))


def pca_projection(heads: Heads, pairs: Embedded, image: Rank, text: Rank) -> Projection:
    """Top eigenvectors of the features' second moment, and of the covariance of the embeddings (captions and images together).

    Every column is signed so that its entry of largest magnitude (the first of several) is positive. The eigenvectors come from
    LAPACK. Their bytes are the same on one machine but not on another, and they are arbitrary within a repeated eigenvalue, so
    store them with the run.

    Args:
        heads: the heads that `pairs` were embedded with.
        pairs: a sample [N] of the corpus.
        image: (ki, ko) of the image head.
        text: (ki, ko) of the text head.

    Raises:
        ValueError: a rank below 1 or above what it projects from.
    """
    _check_ranks(heads, image, text)
    u, v = (part.double() - part.double().mean(0) for part in (pairs.u, pairs.v))
    embedding = u.T @ u + v.T @ v

    def factors(features: Tensor, rank: Rank, like: Tensor) -> Factors:
        moment = features.double().T @ features.double()
        return Factors(_top_eigenvectors(moment, rank[0]).to(like), _top_eigenvectors(embedding, rank[1]).to(like))

    return Projection(factors(pairs.images, image, heads.image), factors(pairs.texts, text, heads.text))


def pca_of_sample(heads: Heads, images: Tensor, texts: Tensor, rank: Rank) -> Projection:
    """The PCA projection of a sample of the corpus. Both heads get one rank, capped at the size of each head.

    Args:
        heads: the heads that the sample is embedded with.
        images: [N, d_x] image features of the sampled pairs.
        texts: [N, d_t] text features.
        rank: (ki, ko).
    """
    return pca_projection(heads, embed(heads, images, texts), *capped_ranks(heads, rank))


def capped_ranks(heads: Heads, rank: Rank) -> tuple[Rank, Rank]:
    """A rank for the image head and one for the text head: the requested rank, capped at the head's own dimensions."""
    image, text = (heads.image.shape, heads.text.shape)
    return (min(rank[0], image[0]), min(rank[1], image[1])), (min(rank[0], text[0]), min(rank[1], text[1]))


def _signs(key: str, rows: int, columns: int) -> Tensor:
    """+1 and -1 [rows, columns] float64, bit after bit from the lowest of each byte."""
    octets = random_bytes(key, -(-rows * columns // 8)).long()
    bits = (octets[:, None] >> torch.arange(8)) & 1
    return 1.0 - 2.0 * bits.flatten()[: rows * columns].view(rows, columns).double()


def random_bytes(key: str, count: int) -> Tensor:
    """[count] uint8 on the CPU, SHAKE-256 of the key."""
    return torch.frombuffer(bytearray(hashlib.shake_256(key.encode()).digest(count)), dtype=torch.uint8)


def _top_eigenvectors(moment: Tensor, rank: int) -> Tensor:
    """[d, rank] eigenvectors of a symmetric [d, d], largest eigenvalue first, with a positive entry of largest magnitude."""
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank]
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def _check_ranks(heads: Heads, image: Rank, text: Rank) -> None:
    for name, weight, rank in (("image", heads.image, image), ("text", heads.text, text)):
        if not all(1 <= k <= n for k, n in zip(rank, weight.shape, strict=True)):
            raise ValueError(f"a rank of {rank} does not fit the {name} head {tuple(weight.shape)}: each from 1 up to its size")
