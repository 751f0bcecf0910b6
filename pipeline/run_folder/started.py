"""The record of the run that was started last in a folder: <run>/started.json, written before any stage runs."""

import json
import time
from typing import Any, NamedTuple

from pydantic import ValidationError

from ecif import __version__
from pipeline import storage
from pipeline.config import Config
from pipeline.console import say
from pipeline.corpus import shards, sidecar
from pipeline.errors import UserError
from pipeline.run_folder import tables
from pipeline.run_folder.artifacts import Artifacts
from pipeline.run_folder.contents import find_artifacts, usable
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.reference import Learned

OLDER = "plan.json"  # runs before version 0.2 wrote this file instead of started.json


class Started(NamedTuple):
    """The run that was started last in a folder."""

    config: Config
    time: float  # unix time
    checkpoints: list[dict[str, str]]  # for each checkpoint, fingerprints of the features, by the name of the dataset

    def datasets(self) -> list[dict[str, Dataset]]:
        """The datasets of each checkpoint, by the name that a user knows: `corpus` or `target NAME`. Shards are listed anew.

        Raises:
            UserError: the corpus or a target has no shards where the configuration says.
        """
        config = self.config
        corpus = shards.find(config.corpus.shards, "corpus.shards", config.corpus.root, config.corpus.missing)
        beside = sidecar.find(corpus, config.corpus.sidecar, config.corpus.uid == "sidecar")
        clean = {name: shards.find(p.shards, f"targets.{name}.shards", missing=p.missing) for name, p in config.targets.items()}
        return [
            {"corpus": Dataset(config.run, features["corpus"], corpus, config.corpus.reading, sidecars=beside)}
            | {
                f"target {name}": Dataset(
                    storage.join(config.run, "targets", name),
                    features[f"target {name}"],
                    found,
                    config.targets[name].reading,
                )
                for name, found in clean.items()
            }
            for features in self.checkpoints
        ]

    def artifacts(self, datasets: dict[str, Dataset], learned: Learned | None = None) -> Artifacts | None:
        """Where the objects of a checkpoint are; None while shards are left to embed.

        Args:
            datasets: of the checkpoint.
            learned: what nights score with; None where a run learns from the corpus as it is.
        """
        targets = {name: datasets[f"target {name}"] for name in self.config.targets}
        if learned is not None:
            names = learned.names(self.config, targets)
            return Artifacts(self.config.run, names, usable(datasets["corpus"].accounting()))
        if any(len(dataset.accounting()) < len(dataset.shards) for dataset in datasets.values()):
            return None
        return find_artifacts(self.config, datasets["corpus"], targets)


def start(config: Config, checkpoints: list[dict[str, Dataset]]) -> Started:
    """Write started.json.

    Args:
        config: of the run.
        checkpoints: the datasets of each checkpoint, by the name that a user knows.
    """
    if storage.exists(storage.join(config.run, OLDER)):
        say(f"{config.run} also holds objects of an older version of ecif: they are left alone, and none is used")
    features = [{name: dataset.fingerprint for name, dataset in datasets.items()} for datasets in checkpoints]
    started = Started(config, round(time.time(), 3), features)
    facts: dict[str, Any] = {"version": __version__, "config": config.model_dump(mode="json"), "started": started.time}
    data = tables.json_bytes(facts | {"checkpoints": features})
    storage.write_bytes(storage.join(config.run, "started.json"), data)
    return started


def read_started(folder: str) -> Started:
    """The run that was started last in a folder. The folder may have been moved since.

    Raises:
        UserError: no run there, or one of another version.
    """
    url = storage.join(folder, "started.json")
    try:
        facts = json.loads(storage.read_bytes(url))
        return Started(Config.model_validate(facts["config"] | {"run": folder}), facts["started"], facts["checkpoints"])
    except FileNotFoundError:
        if storage.exists(storage.join(folder, OLDER)):
            raise UserError(
                f"{folder}: made by an older version of ecif; `ecif run` computes it anew beside what is there"
            ) from None
        raise UserError(f"{folder}: no run there (no started.json)") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{url} is of no run of version {__version__}: {' '.join(str(error).split())[:200]}") from None
