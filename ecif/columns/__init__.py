"""Scores of a pair beside its influence, one file each; a score is registered by its line here."""

from ecif.columns.agreement import Agreement as Agreement
from ecif.columns.clip_score import ClipScore as ClipScore
from ecif.columns.contract import Column as Column
from ecif.columns.contract import HeldOutPairs as HeldOutPairs
from ecif.columns.contract import PairScore as PairScore
from ecif.columns.contract import held_out_values as held_out_values
from ecif.columns.gradient_norm import GradientNorm as GradientNorm
from ecif.columns.gsc import Gsc as Gsc
from ecif.columns.held_out_cosine import HeldOutCosine as HeldOutCosine
from ecif.columns.held_out_loss import HeldOutLoss as HeldOutLoss
from ecif.columns.lemon import Lemon as Lemon
from ecif.columns.negclip_loss import NegClipLoss as NegClipLoss
from ecif.columns.normsim import NormSim2 as NormSim2
from ecif.columns.normsim import NormSimInf as NormSimInf
