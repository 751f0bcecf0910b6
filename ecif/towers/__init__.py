"""Models of open_clip from local files, with the preprocessing that they were trained with, split into trunks and heads."""

from ecif.towers.load import LoadedModel, load, load_uncut, tokenizer, weights_file
from ecif.towers.split import Towers, normalised, resize_transform
from ecif.towers.trained import activation

__all__ = [
    "LoadedModel",
    "Towers",
    "activation",
    "load",
    "load_uncut",
    "normalised",
    "resize_transform",
    "tokenizer",
    "weights_file",
]
