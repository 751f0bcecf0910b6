"""The loss that a configuration names."""

from ecif.losses import Loss
from pipeline.config import Config


def loss_of(config: Config) -> Loss:
    """What the heads are fitted to, and what targets and scores are in."""
    more = {"negative": config.score.negative} if config.loss.kind.has_taylor else {}
    return config.loss.build(**more)
