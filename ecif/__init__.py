"""Influence functions for contrastive (CLIP) training: tensors in, tensors out.

One sign everywhere: influence is the predicted change of the target loss if the pair is removed.
Above 0 the pair helps the target, below 0 it harms it. Method: ECIF, arXiv 2411.11667.
"""

__version__ = "0.1.0"
