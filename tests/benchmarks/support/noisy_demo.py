"""A corpus with planted swaps, by default the demo's, and the configuration of a run on it."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jobs.demo import model
from jobs.demo.plant import plant
from pipeline.config import Config

EMBEDDED = Path(str(files("jobs.demo") / "corpus"))
SWAPPED = "swapped.json"  # in the run folder's parent: the uids


def noisy(
    folder: Path,
    noise: float = 0.2,
    seed: int = 0,
    corpus: Path = EMBEDDED / "corpus",
    target: Path = EMBEDDED / "target",
    **changes: Any,
) -> Config:
    """Swap captions in a copy of the corpus; its run, with one target `clean`, is `folder`/run."""
    plant(corpus, folder / "corpus", folder / SWAPPED, noise, seed)
    config = {
        "run": str(folder / "run"),
        "corpus": {"shards": str(folder / "corpus")},
        "model": {"name": model.build_model(folder / "model")},
        "targets": {"clean": {"shards": str(target)}},
    }
    return Config.model_validate(config | changes)
