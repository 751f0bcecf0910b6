"""A batch with all derivatives of its logits written down, in float64, and the curvature that leaves it with each pair."""

from functools import cached_property

import torch
from torch.func import hessian

from ecif.losses.contrastive import batch_loss, loss_cotangent, pair_derivatives
from ecif.projected.leaving import LeavingCurvature, RootWeights


class Batch:
    """A batch whose derivatives are all written down: J [B, B, k]."""

    def __init__(self, logits, jacobian):
        self.logits, self.jacobian = logits, jacobian

    @cached_property
    def row_mean(self):
        return torch.einsum("ij,ijk->ik", self.logits.softmax(1), self.jacobian)

    @cached_property
    def column_mean(self):
        return torch.einsum("ij,ijk->jk", self.logits.softmax(0), self.jacobian)

    def entries(self, i, j):
        return self.jacobian[i, j]

    def gradient(self):
        return torch.einsum("ij,ijk->k", loss_cotangent(self.logits), self.jacobian)

    def curvature(self):
        """Gauss-Newton: d2L/dS2 differentiated by autograd, between two Jacobians."""
        b = len(self.logits)
        second = hessian(batch_loss)(self.logits).view(b * b, b * b)
        j = self.jacobian.flatten(0, 1)
        return j.T @ second @ j

    def pair_gradients(self):
        """(grad Pos, grad Neg), each [B, k], one coordinate after the other."""
        along = [pair_derivatives(self.logits, tangent) for tangent in self.jacobian.unbind(2)]
        return tuple(torch.stack(part, 1) for part in zip(*along, strict=True))

    def without(self, n):
        kept = torch.arange(len(self.logits)) != n
        return Batch(self.logits[kept][:, kept], self.jacobian[kept][:, kept])

    def to(self, dtype):
        return Batch(self.logits.to(dtype), self.jacobian.to(dtype))


def random_batch(pairs=7, size=6, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(pairs, pairs, generator=g, dtype=torch.float64)
    return Batch(logits, torch.randn(pairs, pairs, size, generator=g, dtype=torch.float64))


def inverse(matrix):
    return lambda rows: torch.linalg.solve(matrix.to(rows), rows.T).T


def leaving_curvature(batch):
    """H_n [B, k, k] as removal_steps has it."""
    pairs = torch.arange(len(batch.logits))
    curvature = LeavingCurvature.of(batch, RootWeights.of(batch.logits), pairs)
    size = batch.jacobian.shape[2]
    factors = curvature.factor(torch.eye(size, dtype=batch.logits.dtype).expand(len(pairs), size, size))
    return factors @ factors.mT
