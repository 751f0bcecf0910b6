"""The two linear heads: their derivatives, their fit, their curvature, and the influence of pairs on them."""

from ecif.heads.heads import (
    Embedded,
    Heads,
    along_each,
    embed,
    logits,
    logits_jvp,
    logits_vjp,
    standardised,
    tangents,
    tangents_vjp,
)

__all__ = [
    "Embedded",
    "Heads",
    "along_each",
    "embed",
    "logits",
    "logits_jvp",
    "logits_vjp",
    "standardised",
    "tangents",
    "tangents_vjp",
]
