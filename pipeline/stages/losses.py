"""The loss that a configuration names."""

from ecif.losses import Loss
from pipeline.config import Config


def loss_of(config: Config) -> Loss:
    """The loss that influence and scores are computed with. `score.negative` says which form its negative part has."""
    more = {"negative": config.score.negative} if config.loss.kind.has_taylor else {}
    return config.loss.build(**more)
