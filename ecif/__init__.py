"""Influence functions for contrastive (CLIP) training: tensors in, tensors out.

Influence has one sign everywhere: it is the predicted change of the target loss if the pair is removed. Above 0 the pair helps
the target, below 0 it harms it. The method is ECIF (arXiv 2411.11667).
"""

from ecif.attribute import Settings, attribute
from ecif.heads import Heads
from ecif.losses import Clip, Dcl, Loss, MvInfoNCE, SigLip, SoftInfoNCE
from ecif.registry import option
from ecif.targets import Contrastive, OfPairs, RetrievalMargin, TargetLoss, ZeroShot
from ecif.towers import load

__version__ = "0.2.0"

__all__ = [
    "Clip",
    "Contrastive",
    "Dcl",
    "Heads",
    "Loss",
    "MvInfoNCE",
    "OfPairs",
    "RetrievalMargin",
    "Settings",
    "SigLip",
    "SoftInfoNCE",
    "TargetLoss",
    "ZeroShot",
    "attribute",
    "load",
    "option",
]
