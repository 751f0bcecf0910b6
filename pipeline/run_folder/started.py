"""What a run is about while it goes on: <run>/plan.json, written when it starts and whenever a stage's fingerprint is known."""

import json
import time
from typing import Any, NamedTuple

from pydantic import ValidationError

from ecif import __version__
from pipeline import storage
from pipeline.config import Config
from pipeline.corpus import shards, sidecar
from pipeline.errors import UserError
from pipeline.run_folder import tables
from pipeline.run_folder.artifacts import fingerprint
from pipeline.run_folder.dataset import Dataset


class Plan(NamedTuple):
    """The run that was started last in a folder.

    Each checkpoint of the model has the fingerprints of its objects as far as they are known: `features`, `target_features` by
    target, then `heads`, `directions`, `scores`.
    """

    config: Config
    started: float  # unix time
    checkpoints: list[dict[str, Any]]

    def note(self, checkpoint: int, **ids: str) -> None:
        """Write down fingerprints that have become known."""
        self.checkpoints[checkpoint].update(ids)
        facts = {"version": __version__, "config": self.config.model_dump(), "started": self.started}
        data = tables.json_bytes(facts | {"checkpoints": self.checkpoints})
        storage.write_bytes(storage.join(self.config.run, "plan.json"), data)

    def datasets(self) -> list[dict[str, Dataset]]:
        """For each checkpoint the datasets, by the name that a user knows: `corpus`, `target NAME`; shards are listed anew.

        Raises:
            UserError: the corpus or a target is not there.
        """
        config = self.config
        corpus = shards.find(config.corpus.shards, "corpus.shards")
        beside = sidecar.find(corpus, config.corpus.sidecar, config.corpus.uid == "sidecar")
        clean = {name: shards.find(pairs.shards, f"targets.{name}.shards") for name, pairs in config.targets.items()}
        return [
            {"corpus": Dataset(config.run, ids["features"], corpus, config.corpus.caption, sidecars=beside)}
            | {
                f"target {name}": Dataset(
                    storage.join(config.run, "targets", name), ids["target_features"][name], found, config.targets[name].caption
                )
                for name, found in clean.items()
            }
            for ids in self.checkpoints
        ]

    def scores(self) -> str | None:
        """Fingerprint of the columns that the run ends with; None while a checkpoint has none."""
        each = [ids.get("scores") for ids in self.checkpoints]
        if None in each:
            return None
        return each[0] if len(each) == 1 else fingerprint(each)


def start_plan(config: Config, known: list[dict[str, Any]]) -> Plan:
    """Write down that a run starts.

    Args:
        config: of the run.
        known: of each checkpoint, the fingerprints of its features.
    """
    plan = Plan(config, round(time.time(), 3), known)
    plan.note(0)
    return plan


def read_plan(folder: str) -> Plan:
    """The plan of the run that was started last in a folder, wherever the folder is by now.

    Raises:
        UserError: no run there, or one of another version.
    """
    url = storage.join(folder, "plan.json")
    try:
        facts = json.loads(storage.read_bytes(url))
        return Plan(Config.model_validate(facts["config"] | {"run": folder}), facts["started"], facts["checkpoints"])
    except FileNotFoundError:
        raise UserError(f"{folder}: no run there (no plan.json)") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{url} is of no run of version {__version__}: {' '.join(str(error).split())[:200]}") from None
