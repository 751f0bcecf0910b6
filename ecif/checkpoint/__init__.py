"""From a file that some trainer wrote to the weights of a model. No file can run code here."""

from ecif.checkpoint.error import ModelError
from ecif.checkpoint.formats import Content, read
from ecif.checkpoint.weights import load_into

__all__ = ["Content", "ModelError", "load_into", "read"]
