"""Gradients of the heads in few numbers: the index and the second order."""
