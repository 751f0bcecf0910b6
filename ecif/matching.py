"""How well do heads match images and captions that no fit has seen, when some of the pairs are wrong?

The mean loss of held-out pairs answers another question. At logit scale 100 a wrong pair loses 10 nats where a right one loses
0.3, so that a fifth of wrong pairs rules the mean, and heads that merely become less confident lower it. Here, a caption
belongs to its image with probability 1 - e. Otherwise it belongs to any image of the batch, each as likely as the other:

    loss = min over e and tau of   -mean log[ (1 - e) softmax(tau S)_own + e / B ]        over rows and over columns

A wrong pair costs at most log(B / e), whatever the heads say of it. The share e is estimated together with the temperature tau,
which makes heads comparable that differ in confidence only. It counts the pairs whose caption belongs to another image. A
caption that fits no image better than chance needs no e. Nothing but the logits is used, so the measure is the same for all
losses. A bias of all logits cancels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.search import bisect, minimise
from ecif.temperature import TEMPERATURES

HALVINGS = 30  # of the search for the share of wrong pairs
STEPS = 13  # temperatures that are tried first; golden sections refine the best
SECTIONS = 12


class Matching(NamedTuple):
    """How well heads match pairs."""

    loss: float  # nats a pair, mean over both directions; log B if the heads know nothing
    wrong: float  # estimated share of pairs that are matched at random, 0 to 1
    chance: float  # log B: the loss of heads that know nothing, mean over the batches


def matching(similarities: list[Tensor]) -> Matching:
    """Judge heads by the logits of pairs that they were not fitted on.

    Args:
        similarities: logits [B, B] of each batch; entry (n, n) belongs to pair n. Batches may differ in size.
    """
    chance = torch.cat([s.new_full((len(s),), -math.log(len(s))) for s in similarities])

    def at(log_tau: float) -> tuple[float, float]:
        scaled = [math.exp(log_tau) * s for s in similarities]
        rows = torch.cat([s.log_softmax(1).diagonal() for s in scaled])
        columns = torch.cat([s.log_softmax(0).diagonal() for s in scaled])
        return _mixture(torch.cat([rows, columns]).double().exp(), torch.cat([chance, chance]).double().exp())

    bound = math.log(TEMPERATURES)
    best = minimise(lambda log_tau: at(log_tau)[0], -bound, bound, STEPS, SECTIONS)
    return Matching(*at(best), -chance.double().mean().item())


def _mixture(own: Tensor, chance: Tensor) -> tuple[float, float]:
    """The smallest -mean log[(1 - e) own + e chance] over e, and that e. It is convex in e."""

    def rises(e: float) -> bool:
        return ((own - chance) / ((1 - e) * own + e * chance)).sum().item() > 0

    e = sum(bisect(rises, 0.0, 1.0, HALVINGS)) / 2
    return -((1 - e) * own + e * chance).log().mean().item(), e
