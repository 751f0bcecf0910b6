"""Relative influence, for trace-back: the change of a target per unit of the pair's effect on the model.

Plain influence ranks outliers first, for every target. Dividing by the pair's total effect on the model brings up the pairs
that matter to this target in particular. Signs are those of influence: above 0 the pair helps the target, below 0 it harms it.
"""

import torch
from torch import Tensor


def gram(positive: Tensor, negative: Tensor) -> Tensor:
    """G [N, 2, 2] float64: inner products of each pair's parameter changes H^-1 grad Pos and H^-1 grad Neg, both [N, k]."""
    parts = torch.stack([positive, negative], dim=1).double()
    return parts @ parts.mT


def relative_influence(positive: Tensor, negative: Tensor, gram: Tensor, tolerance: float = 1e-6) -> Tensor:
    """The largest change of the target per unit of parameter change, over all mixtures of the pair's two parts.

    This is ECIF's constrained form (arXiv 2411.11667). Let d be a unit vector in the plane of posIF = H^-1 grad Pos and
    negIF = H^-1 grad Neg. The maximum of |<grad L_T, d>| over d is sqrt(b^T G^+ b), with
    b = (<grad L_T, posIF>, <grad L_T, negIF>) and G the Gram matrix of posIF and negIF. ECIF defines both with the opposite
    sign, which changes nothing here.

    Args:
        positive: b_1, influence as a positive, [N] or [T, N].
        negative: b_2, influence as a negative, the same shape.
        gram: [N, 2, 2], see `gram`.
        tolerance: sine of the angle below which the parts count as parallel. The plane is then a line, and G^+ the
            pseudo-inverse of a matrix of rank 1.

    Returns:
        The shape of `positive`, float64, target loss units per parameter unit, with the sign of positive + negative. Its
        magnitude is at most |grad L_T|. It is 0 for a pair that changes nothing, or whose parts cancel.
    """
    positive, negative, gram = positive.double(), negative.double(), gram.double()
    # Gram-Schmidt from the longer part, in inner products only.
    swap = gram[:, 1, 1] > gram[:, 0, 0]
    long, short = torch.where(swap, negative, positive), torch.where(swap, positive, negative)
    long_sq, short_sq = gram.diagonal(dim1=1, dim2=2).amax(1), gram.diagonal(dim1=1, dim2=2).amin(1)
    slope = _ratio(gram[:, 0, 1], long_sq)
    rest_sq = short_sq - slope * gram[:, 0, 1]
    rest_sq = rest_sq.where(rest_sq > tolerance**2 * short_sq, 0.0)
    along, across = _ratio(long.square(), long_sq), _ratio((short - slope * long).square(), rest_sq)
    return (positive + negative).sign() * (along + across).sqrt()


def theta_relatif(influence: Tensor, change: Tensor) -> Tensor:
    """Influence [N] or [T, N] divided by the norm of the parameter change H^-1 g [N, k]; 0 for a pair that changes nothing.

    This is theta-relative influence of RelatIF (arXiv 2003.11630). `change` is the change by both parts together.
    """
    return _ratio(influence.double(), change.double().norm(dim=1))


def loss_relatif(influence: Tensor, self_influence: Tensor) -> Tensor:
    """Influence [N] or [T, N] divided by the root of self_influence g^T H^-1 g [N]; 0 where self_influence is 0.

    This is l-relative influence of RelatIF (arXiv 2003.11630). The root measures the expected change of the loss.
    """
    return _ratio(influence.double(), self_influence.double().sqrt())


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b.where(b > 0, 1.0), 0.0)
