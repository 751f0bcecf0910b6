"""Contrastive losses as functions of the similarity tensor: all that influence needs to know about them."""

from ecif.losses.clip import Clip
from ecif.losses.contract import Loss
from ecif.losses.dcl import Dcl
from ecif.losses.mv_infonce import MvInfoNCE
from ecif.losses.siglip import SigLip
from ecif.losses.soft_infonce import SoftInfoNCE

CLIP = Clip()
TWO_TOWER: dict[str, Loss] = {"clip": CLIP, "siglip": SigLip(), "dcl": Dcl(), "soft_infonce": SoftInfoNCE()}

__all__ = ["CLIP", "TWO_TOWER", "Clip", "Dcl", "Loss", "MvInfoNCE", "SigLip", "SoftInfoNCE"]
