"""Contrastive losses as functions of the similarity tensor. Influence needs no more of a loss than that."""

from ecif.losses.clip import Clip
from ecif.losses.contract import Loss
from ecif.losses.dcl import Dcl
from ecif.losses.mv_infonce import MvInfoNCE
from ecif.losses.siglip import SigLip
from ecif.losses.soft_infonce import SoftInfoNCE

CLIP = Clip()

__all__ = ["CLIP", "Clip", "Dcl", "Loss", "MvInfoNCE", "SigLip", "SoftInfoNCE"]
