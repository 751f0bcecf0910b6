"""What a run starts from, checked before anything is started: the model, the corpus, the targets."""

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel

from ecif import towers
from pipeline import shards, storage
from pipeline.config import Config, Model, Pairs
from pipeline.dataset import Dataset
from pipeline.errors import UserError
from pipeline.shards import Shard


def load_model(model: Model) -> towers.Towers:
    """The model on this machine's CPU: its fingerprint, heads and preprocessing.

    Raises:
        UserError: it is unknown, or its weights can't be had.
    """
    if model.checkpoint is not None and not os.path.isfile(model.checkpoint):
        raise UserError(f"model.checkpoint: no file {model.checkpoint}")
    try:
        return towers.load(model.name, model.checkpoint)
    except Exception as error:  # noqa: BLE001  (open_clip raises whatever its parts raise)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model {model.name!r} can't be loaded: {first[:300]}") from None


FORMAT = 1  # raise it with every change of what is computed: objects of another format are never taken for this one's


class Inputs(NamedTuple):
    """Everything that a run reads."""

    model: towers.Towers
    corpus: Dataset
    targets: dict[str, Dataset]


def load_inputs(config: Config) -> Inputs:
    """Find every shard and load the model.

    Raises:
        UserError: shards or a model that can't be had.
    """
    corpus = shards.find(config.corpus.shards, "corpus.shards")
    clean = {name: shards.find(pairs.shards, f"targets.{name}.shards") for name, pairs in config.targets.items()}
    model = load_model(config.model)
    return Inputs(
        model,
        as_dataset(config.run, config.corpus, corpus, config, model),
        {
            name: as_dataset(storage.join(config.run, "targets", name), config.targets[name], found, config, model)
            for name, found in clean.items()
        },
    )


def as_dataset(folder: str, pairs: Pairs, found: list[Shard], config: Config, model: towers.Towers) -> Dataset:
    """Shards, and the folder that their features go to."""
    return Dataset(folder, fingerprint(model.fingerprint, pairs.caption, config.embed), found, pairs.caption)


def fingerprint(*parts: Any) -> str:
    """16 hex digits of everything that an output depends on, the format of this version's objects included."""
    plain: Callable[[Any], Any] = lambda value: value.model_dump() if isinstance(value, BaseModel) else str(value)  # noqa: E731
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True, default=plain).encode()).hexdigest()[:16]
