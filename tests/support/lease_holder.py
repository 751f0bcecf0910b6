"""Another process that holds a run folder."""

import os
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event

from pipeline import storage
from pipeline.errors import RunError, UserError
from pipeline.storage.lease import hold_folder


def hold_and_write(folder: str, ttl: float, pipe: Connection, environment: dict[str, str], start: Event | None) -> None:
    """Hold the folder, say so, write to every URL that arrives until an empty one does; say how it ended."""
    os.environ.update(environment)
    if start is not None:
        start.wait()
    try:
        with hold_folder(folder, ttl):
            pipe.send("held")
            while url := pipe.recv():
                storage.write_bytes(url, b"other")
                pipe.send("written")
    except (UserError, RunError) as error:
        pipe.send(f"{type(error).__name__}: {error}")
    else:
        pipe.send("released")
