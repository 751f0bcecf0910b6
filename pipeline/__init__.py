"""The pipeline: a corpus in, influence columns out.

    from pipeline import Config, run

    done = run(Config.from_yaml("config.yaml"))
    done.scores(["uid", "misalignment"])

Names are imported when they are first used, because Ray and torch take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.errors import RunError, UserError
    from pipeline.run import run
    from pipeline.run_folder.finished import open_run

__all__ = ["Config", "RunError", "UserError", "open_run", "run"]
PLACES = {
    "Config": "pipeline.config",
    "RunError": "pipeline.errors",
    "UserError": "pipeline.errors",
    "open_run": "pipeline.run_folder.finished",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
