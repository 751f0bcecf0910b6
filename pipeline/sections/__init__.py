"""The sections of the configuration: the keys, what they mean, and their allowed values."""

from pipeline.sections.method import Filter, Fit, Index, Score, Scoring, Solve
from pipeline.sections.model import Model, Preprocess
from pipeline.sections.nightly import Drift, Nightly, Renew
from pipeline.sections.pairs import Caption, Corpus, Embed, Pairs, Prompts, Reading, Target
from pipeline.sections.prices import Prices
from pipeline.sections.section import Name, Place, Section

__all__ = [
    "Caption",
    "Corpus",
    "Drift",
    "Embed",
    "Filter",
    "Fit",
    "Index",
    "Model",
    "Name",
    "Nightly",
    "Pairs",
    "Place",
    "Preprocess",
    "Prices",
    "Prompts",
    "Reading",
    "Renew",
    "Score",
    "Scoring",
    "Section",
    "Solve",
    "Target",
]
