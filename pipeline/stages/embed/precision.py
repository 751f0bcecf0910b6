"""Which precision `embed.precision: auto` stands for: decided by the run that begins, kept by every run that goes on."""

import subprocess
from typing import Any, cast

import ray

from ecif.towers.precision import Precision, best_precision
from pipeline.config import Config
from pipeline.console import say
from pipeline.errors import UserError
from pipeline.run_folder.started import read_started
from pipeline.workers.cluster import Resources, device

NATIVE_BF16 = 8.0  # the compute capability from which on a GPU computes in bf16


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
    if len(ray.nodes()) == 1 and (told := _told_by_the_driver()):
        return told
    ask: Any = ray.remote(**resources.actor, max_retries=2, max_calls=0)(_of_this_device)
    return ray.get(ask.remote())


def _told_by_the_driver() -> Precision | None:
    """The best precision of this machine's GPUs; None if NVIDIA's tool is missing, or they differ.

    To ask a process with torch on a GPU takes seconds, for which the first pair would wait.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        best = {"bf16" if float(capability) >= NATIVE_BF16 else "fp16" for capability in told.split()}
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return cast(Precision, best.pop()) if len(best) == 1 else None


def _of_this_device() -> Precision:
    return best_precision(device())
