"""Which precision `embed.precision: auto` stands for: decided by the run that begins, kept by every run that goes on."""

from typing import Any

import ray

from ecif.towers.precision import Precision, best_precision
from pipeline.config import Config
from pipeline.console import say
from pipeline.errors import UserError
from pipeline.run_folder.started import read_started
from pipeline.workers.cluster import Resources, device


def settle(config: Config, resources: Resources) -> Precision:
    """The precision that features are made in.

    A run folder whose features were begun in one precision goes on in it, on whatever machine, and says so. So features of two
    precisions never mix, and nothing is embedded anew because a run was resumed elsewhere.
    """
    if config.embed.precision != "auto":
        return config.embed.precision
    begun, best = begun_in(config), _best(resources)
    if begun is None:
        return best
    if begun != best:
        said = f"features were begun in {begun} and go on in it; auto would be {best} here"
        say(f"{said}: embed.precision: {best} embeds everything anew")
    return begun


def begun_in(config: Config) -> Precision | None:
    """The precision of the run that was started last in the folder; None if there is none."""
    try:
        begun = read_started(config.run).config.embed.precision
    except UserError:
        return None
    return None if begun == "auto" else begun


def in_precision(config: Config, precision: Precision | None) -> Config:
    """The configuration with that precision, if it is known."""
    if precision is None or config.embed.precision != "auto":
        return config
    return config.model_copy(update={"embed": config.embed.model_copy(update={"precision": precision})})


def _best(resources: Resources) -> Precision:
    if resources.device_type == "cpu":
        return "fp32"
    ask: Any = ray.remote(**resources.actor, max_retries=2, max_calls=0)(_of_this_device)
    return ray.get(ask.remote())


def _of_this_device() -> Precision:
    return best_precision(device())
