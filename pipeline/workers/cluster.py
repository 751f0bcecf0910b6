"""Where the work runs: local Ray by default, the cluster of RAY_ADDRESS when it is set."""

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from pipeline.console import say
from pipeline.errors import RunError, UserError

STARTS = 3  # tries to start Ray, which gives itself 30 s: too little where a machine is busy


class Resources(NamedTuple):
    """What an actor gets, and how many there are."""

    workers: int
    actor: dict[str, Any]  # Ray options of one actor
    reader: dict[str, Any]  # Ray options of one reading task


@contextmanager
def session(workers: int | None) -> Iterator[Resources]:
    """Connect to Ray, or start it on this machine, and say what a pool of actors gets.

    Args:
        workers: actors; None for one a GPU, or one a CPU core where there is no GPU.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    started = not ray.is_initialized()
    try:
        if started:
            try:
                _join(os.environ["RAY_ADDRESS"]) if "RAY_ADDRESS" in os.environ else _start()
            except SystemExit:  # what Ray makes of SIGTERM meanwhile
                raise KeyboardInterrupt from None
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own prints a native trace and dies at once
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.raise_original_map_exception = True  # not only its text
        context.target_max_block_size = 1 << 20  # a block is one shard part: parts spread over the actors one by one
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # an error is raised, it need not be logged twice as well
        device()  # the driver, too, sums in one thread
        yield _resources(workers)
    except RayError as error:
        if line := _blameless(error):
            raise RunError(line) from None
        raise
    except OSError as error:
        raise RunError(_resumable(error)) from None
    except KeyboardInterrupt as told:
        traceback.clear_frames(told.__traceback__)  # Ray Data's iterators end while there is a Ray, or complain of it at exit
        raise RunError(_resumable("it was told to stop")) from None
    finally:
        if started:
            ray.shutdown()


def _blameless(error: RayError) -> str | None:
    """One line about what is no fault of the program, without Ray's and the worker's traces; None for what may be one."""
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, RunError):
            return str(error.cause).splitlines()[0]
        if not isinstance(error.cause, OSError):
            return None
        # Ray Data appends advice, as another line, or in place of a file's name.
        return _resumable(error.cause.strerror or str(error.cause).splitlines()[0])
    if getattr(error, "actor_init_failed", False):  # of the cause there is only the text, in its last line
        last = str(error).strip().splitlines()[-1]
        return _resumable(last) if last.startswith("OSError: ") else None
    return _resumable(f"Ray gave up: {type(error).__name__}: {error}")


def _resumable(what: object) -> str:
    """One line about a run that failed for reasons outside of it."""
    line = " ".join(str(what).split())[:600]
    return f"the run failed: {line} (what is written is whole; the same command resumes)"


def _start() -> None:
    """Start Ray on this machine."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its remarks on Ray Data's own actors are no news
    for left in reversed(range(STARTS)):
        try:
            with _quiet():
                ray.init("local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
            return
        except Exception as error:  # noqa: BLE001  (Ray has no kind of its own for a machine too busy, full or small)
            ray.shutdown()
            if not left:
                raise RunError(_resumable(f"Ray can't be started on this machine: {error}")) from None


def _join(address: str) -> None:
    """Join the cluster at `address`, which can take Ray minutes to give up on."""
    say(f"joining the Ray cluster at {address}")
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except (ValueError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no Ray at {address} ({reason}); RAY_ADDRESS is host:6379, or auto on one of its nodes") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Ray's native code prints about its own log level off the terminal; what goes wrong is raised."""
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def _resources(workers: int | None) -> Resources:
    total = ray.cluster_resources()
    if gpus := int(total.get("GPU", 0)):
        # An actor's work is on its GPU: it claims no core that a reader could wait for.
        return Resources(min(workers or gpus, gpus), {"num_gpus": 1, "num_cpus": 0}, {"num_cpus": 1})
    cpus = int(total.get("CPU", 0))
    if not cpus:
        raise RunError("the Ray cluster has no CPUs or GPUs: wait until its workers have joined")
    count = min(workers or cpus, cpus)
    # An actor computes on one core, a reader mostly waits: both fit, and readers can always be scheduled.
    return Resources(count, {"num_cpus": 0.75}, {"num_cpus": 0.25})


def room(resources: Resources) -> int:
    """How many of a pool's actors there is room for now: nodes may have left since the session began."""
    kind = "GPU" if "num_gpus" in resources.actor else "CPU"
    return max(1, min(resources.workers, int(ray.cluster_resources().get(kind, 0))))


def device() -> torch.device:
    """The GPU that Ray gave this process, else the CPU, with one thread: sums must not depend on how many cores are free."""
    torch.set_num_threads(1)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
