"""The loss that a configuration names."""

from ecif.losses import TWO_TOWER, Clip, Loss
from pipeline.config import Config


def loss_of(config: Config) -> Loss:
    """What the heads are fitted to, and what targets and scores are in."""
    return Clip(config.score.negative) if config.loss == "clip" else TWO_TOWER[config.loss]
