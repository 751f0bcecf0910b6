"""Training of whole small CLIP models, to judge what a filter keeps: tensors in, tensors out."""

from ecif.training.architecture import SMALL, build
from ecif.training.measures import measure
from ecif.training.train import Images, Recipe, train

__all__ = ["SMALL", "Images", "Recipe", "build", "measure", "train"]
