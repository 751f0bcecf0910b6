"""Projected gradients of the heads: the index, and influence to second order."""
