"""Clean sets whose improvement counts: what each kind asks of the model."""

from ecif.targets.contract import OfPairs, TargetData, TargetLoss
from ecif.targets.contrastive import Contrastive
from ecif.targets.coverage import ENOUGH_COVERAGE, coverage
from ecif.targets.retrieval_margin import RetrievalMargin
from ecif.targets.zero_shot import ZeroShot

__all__ = [
    "ENOUGH_COVERAGE",
    "Contrastive",
    "OfPairs",
    "RetrievalMargin",
    "TargetData",
    "TargetLoss",
    "ZeroShot",
    "coverage",
]
