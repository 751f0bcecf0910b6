"""Where the work runs: local Ray by default, the cluster of RAY_ADDRESS when it is set."""

import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import ray
import torch
from ray.data import ActorPoolStrategy
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from pipeline.console import say
from pipeline.errors import RunError, UserError
from pipeline.workers.address import why_not
from pipeline.workers.modules import SameModules, search_path
from pipeline.workers.process import as_found
from pipeline.workers.token import provide_token
from pipeline.workers.waiting import wait_for_nodes

# The last line of a traceback from a worker's start, where that is no fault of the program: its node lacks a file or a package.
CAUSE = re.compile(r"(?:[\w.]+\.)?(?:OSError|FileNotFoundError|PermissionError|ModelError|ModuleNotFoundError): (.+)")
HERE = ("", "local")  # addresses that mean Ray of its own
MOST_ACTORS = 100_000  # no bound of ours: Ray Data grows a pool only by GPUs that are free
STARTS = 3  # tries to start Ray; each gives up after 30 s, too early on a busy machine


class Resources(NamedTuple):
    """How many actors there are, and what an actor and a reading task get."""

    workers: int
    actor: dict[str, Any]  # Ray options of one actor
    reader: dict[str, Any]  # Ray options of one reading task
    most: int | None = None  # actors that a pool grows to when GPUs join; None if it does not grow

    @property
    def device_type(self) -> Literal["cpu", "cuda"]:
        """What an actor computes on."""
        return "cuda" if "num_gpus" in self.actor else "cpu"

    def pool(self, tasks: int, threads: int = 1) -> ActorPoolStrategy:
        """A pool of actors for so many tasks. On a cluster it grows as GPUs join; it never shrinks, as models load slowly.

        Args:
            tasks: the most that there may be.
            threads: of each actor, in which it works on tasks; one more task waits at it.
        """
        size = max(1, min(self.workers, tasks))
        sizes = {"min_size": size, "initial_size": size, "max_size": max(size, min(self.most or size, tasks))}
        more: dict[str, Any] = {}
        if threads > 1:
            more = {"max_concurrent_calls_per_actor": threads, "max_tasks_in_flight_per_actor": threads + 1}
            more["enable_true_multi_threading"] = True
        return ActorPoolStrategy(**sizes, **more)


@contextmanager
def session(workers: int | None, device: Literal["auto", "gpu"] = "auto") -> Iterator[Resources]:
    """Connect to Ray, or start it on this machine, and say what a pool of actors gets.

    The process is left as it was found. Ray is shut down if it was started here. A cluster that has nothing to compute on
    yet is waited for.

    Args:
        workers: number of actors. None means one for each GPU, or one for each CPU core if there is no GPU.
        device: gpu waits for a GPU to join, and takes no cluster for one of CPUs.

    Raises:
        UserError: `gpu`, and this machine has none, or no cluster answers at RAY_ADDRESS.
    """
    with as_found():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # silences warnings about Ray Data's own actors
        started = not ray.is_initialized()
        try:
            if started:
                _start_or_join()
            _configure()
            yield _resources(workers, device, on_cluster=not started or _address() not in HERE)
        except RayError as error:
            if line := _blameless(error):
                raise RunError(line) from None
            raise
        except OSError as error:
            raise RunError(_resumable(error)) from None
        except KeyboardInterrupt as told:
            # Ray Data's iterators have to end before Ray does, or they complain at exit.
            traceback.clear_frames(told.__traceback__)
            raise RunError(_resumable("it was told to stop")) from None
        finally:
            if started:
                ray.shutdown()


def _address() -> str:
    return os.environ.get("RAY_ADDRESS", "").strip()


def _start_or_join() -> None:
    address = _address()
    _answer_sigterm()
    try:
        if address in HERE:
            _start()
        else:
            _join(address)
    except SystemExit:  # Ray turns a SIGTERM that arrives meanwhile into this
        raise KeyboardInterrupt from None
    _answer_sigterm()


def _answer_sigterm() -> None:
    """Treat SIGTERM as Ctrl-C. By default it ends the process without a word; Ray's own handler prints a native trace."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _configure() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # not only its text
    context.target_max_block_size = 1 << 20  # a block is one shard part: parts spread over the actors one by one
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, so they need no log
    device()  # the driver sums in one thread, too


def _blameless(error: RayError) -> str | None:
    """One line about an error that is no fault of the program, without traces; None if it may be a fault of the program."""
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, RunError):
            return str(error.cause).splitlines()[0]
        if not isinstance(error.cause, OSError):
            return None
        # Ray Data appends advice to the message: in a further line, or in the place of a file's name.
        return _resumable(error.cause.strerror or str(error.cause).splitlines()[0])
    if getattr(error, "actor_init_failed", False):  # the cause is only there as text, in the last line
        cause = CAUSE.match(str(error).strip().splitlines()[-1])
        node = re.search(r"\bip=([\w.:]+)", str(error))
        where = f" on node {node[1]}" if node else ""
        return _resumable(f"a worker can't start{where}: {cause[1]}") if cause else None
    return _resumable(f"Ray gave up: {type(error).__name__}: {error}")


def _resumable(what: object) -> str:
    """One line about a run that failed for reasons outside of it."""
    line = " ".join(str(what).split())[:600]
    return f"the run failed: {line} (what is written is whole; the same command resumes)"


def _start() -> None:
    """Start Ray on this machine."""
    provide_token()
    for left in reversed(range(STARTS)):
        try:
            with _quiet():
                job = SameModules(search_path(own=True))
                ray.init("local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, job_config=job)
            return
        except Exception as error:  # noqa: BLE001  (Ray has no kind of its own for a machine too busy, full or small)
            ray.shutdown()
            if not left:
                where = "its files go to a short path on a disk with room: RAY_TMPDIR, or TMPDIR"
                raise RunError(_resumable(f"Ray can't be started on this machine: {str(error)[:400]}; {where}")) from None


def _join(address: str) -> None:
    """Join the cluster at `address`."""
    say(f"joining the Ray cluster at {address}")
    reason = why_not(address)
    if reason is None:
        os.environ["RAY_ADDRESS"] = address
        try:
            with _quiet():
                ray.init(logging_level=logging.ERROR, log_to_driver=False, job_config=SameModules(search_path(own=False)))
            return
        except (ValueError, ConnectionError, RuntimeError, AuthenticationError) as error:  # such as another version of Ray
            reason = " ".join(str(error).split())[:300]
    raise UserError(
        f"RAY_ADDRESS={address}: {reason} (it is host:6379 of a running cluster, or auto on one of its nodes; "
        "without it Ray is started on this machine)"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what Ray's native code prints about its log level on standard error. Failures are raised as exceptions."""
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def _resources(workers: int | None, device: str, on_cluster: bool) -> Resources:
    total = ray.cluster_resources()
    if device == "gpu" and not total.get("GPU") and not on_cluster:
        raise UserError("device: gpu, and Ray finds none on this machine")
    if on_cluster:
        total = wait_for_nodes(("GPU",) if device == "gpu" else ("CPU", "GPU"))
    if gpus := int(total.get("GPU", 0)):
        # An actor works on its GPU. It claims no core, because a reader may be waiting for one.
        most = (workers or MOST_ACTORS) if on_cluster else None
        return Resources(min(workers or gpus, gpus), {"num_gpus": 1, "num_cpus": 0}, {"num_cpus": 1}, most)
    cpus = int(total.get("CPU", 0))
    if not cpus:
        raise RunError("Ray has no CPU to work with on this machine")
    count = min(workers or cpus, cpus)
    # An actor computes on one core and a reader mostly waits. With these shares both fit, so readers can always be scheduled.
    return Resources(count, {"num_cpus": 0.75}, {"num_cpus": 0.25})


def free_actors(resources: Resources) -> int:
    """How many actors of a pool the cluster has room for now. Nodes may have left since the session began."""
    kind = "GPU" if resources.device_type == "cuda" else "CPU"
    return max(1, min(resources.workers, int(ray.cluster_resources().get(kind, 0))))


def device() -> torch.device:
    """The GPU that Ray gave this process, else the CPU.

    Torch is set to one thread, because sums must not depend on how many cores are free.
    """
    torch.set_num_threads(1)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
