"""What every stage of a run needs, and a clock for the stages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pipeline.config import Config
from pipeline.run_folder.artifacts import Artifacts
from pipeline.workers.cluster import Resources


class Run(NamedTuple):
    """A run with one checkpoint, after `embed`."""

    config: Config
    resources: Resources
    artifacts: Artifacts


class Clock:
    """Wall time of each stage in this call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body under the stage's name; the times of several bodies add up."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
