"""What a run starts from, checked before anything is started: the model, the corpus, the targets."""

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from ecif import towers
from pipeline import shards, storage
from pipeline.config import Config, Model, Pairs
from pipeline.dataset import Dataset
from pipeline.errors import UserError


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


def dataset(config: Config, name: str, model: towers.Towers) -> Dataset:
    """The corpus (name "") or a target of a run.

    Raises:
        UserError: no shards there.
    """
    if not name:
        return open_dataset(config.run, config.corpus, "corpus", config, model)
    folder = storage.join(config.run, "targets", name)
    return open_dataset(folder, config.targets[name], f"targets.{name}", config, model)


def open_dataset(folder: str, pairs: Pairs, key: str, config: Config, model: towers.Towers) -> Dataset:
    """Any pairs, with the folder that their features go to; `key` names them in an error."""
    found = shards.find(pairs.shards, f"{key}.shards")
    return Dataset(folder, fingerprint(model.fingerprint, pairs.caption, config.embed), found, pairs.caption)


def fingerprint(*parts: Any) -> str:
    """16 hex digits of everything that an output depends on."""
    plain: Callable[[Any], Any] = lambda value: value.model_dump() if isinstance(value, BaseModel) else str(value)  # noqa: E731
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=plain).encode()).hexdigest()[:16]
