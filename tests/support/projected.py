"""The pairs of a small problem seen through every kind of projection."""

import torch

from ecif.heads import embed
from ecif.projected.curvature import gauss_newton
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import identity_projection, pca_projection, random_projection
from tests.support.problems import random_features, random_heads

HEADS = random_heads()
IMAGES, TEXTS = random_features(12)
PAIRS = embed(HEADS, IMAGES, TEXTS)
BATCHES = list(torch.randperm(12, generator=torch.Generator().manual_seed(1)).split(6))
IDENTITY = identity_projection(HEADS)
RANDOM = random_projection(HEADS, (3, 2), (4, 3), seed=5)
PCA = pca_projection(HEADS, PAIRS, (3, 2), (4, 3))
PROJECTIONS = {"identity": IDENTITY, "random": RANDOM, "pca": PCA}
SIZE = HEADS.size


def matrix_of(projection):
    """R [P, k], one unit direction after another."""
    return projection.apply(HEADS, torch.eye(SIZE, dtype=torch.float64))


def seen(rows, projection, heads=HEADS, pairs=PAIRS):
    """The pairs at `rows` as one projected batch."""
    return project_batch(heads, pairs.take(rows), projection)


def indexed(projection, kind="exact"):
    """Gradients of all pairs in the order of the pairs, and the exact curvature."""
    k = projection.size
    gradients, curvature = torch.zeros(2, 12, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
    for rows in BATCHES:
        batch = seen(rows, projection)
        gradients[:, rows] = torch.stack(pair_gradients(batch, kind))
        curvature += gauss_newton(batch)
    return gradients, curvature
