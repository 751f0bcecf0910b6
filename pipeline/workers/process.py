"""Leave the calling process as it was found, because a run may be called from a notebook or from another program."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import torch

CONTEXT = ("enable_progress_bars", "raise_original_map_exception", "target_max_block_size")  # of Ray Data; a run sets them
LOGGERS = ("", "ray", "ray.data")  # libraries that log before anything is configured add a handler to the root


@contextmanager
def as_found() -> Iterator[None]:
    """After the body, restore what a run changes: environment, signal handlers, threads, loggers, Ray Data's context."""
    environment = dict(os.environ)
    context = ray.data.DataContext.get_current()
    settings = {name: getattr(context, name) for name in CONTEXT}
    loggers = {name: _state(logging.getLogger(name)) for name in LOGGERS}
    threads = torch.get_num_threads()
    main = threading.current_thread() is threading.main_thread()
    terminate = signal.getsignal(signal.SIGTERM) if main else None
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        for name, value in settings.items():
            setattr(context, name, value)
        for name, (level, propagate, handlers) in loggers.items():
            logger = logging.getLogger(name)
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
        torch.set_num_threads(threads)
        if main:
            signal.signal(signal.SIGTERM, terminate)


def _state(logger: logging.Logger) -> tuple[int, bool, list[logging.Handler]]:
    return logger.level, logger.propagate, list(logger.handlers)
