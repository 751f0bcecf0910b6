"""The model in a process: its file of weights on this node, the same bytes everywhere, and loaded."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecif import towers
from ecif.towers import LoadedModel, Towers
from pipeline.sections import Model
from pipeline.storage.cache import fetch, sha256_of


def load(model: Model, named: bool = False) -> Towers:
    """Load the model on the CPU of this machine, split into trunks and heads; `named` with its fingerprint, as the driver does.

    Raises:
        ModelError: it can't be loaded as the configuration says.
        OSError: the weights can't be fetched, or are others than the driver has.
    """
    loaded = towers.load(*_arguments(model), named=named)
    loaded.sha256 = model.sha256
    return loaded


def load_uncut(model: Model) -> LoadedModel:
    """The whole model; errors are those of `load`."""
    return towers.load_uncut(*_arguments(model))


def tokens(model: Model, captions: list[str]) -> NDArray[np.int32]:
    """The tokens [B, L] of captions, cut to the model's context length. Its weights are not loaded."""
    return as_tokens(_tokenizer(model.name), captions)


def as_tokens(tokenizer: Any, captions: list[str]) -> NDArray[np.int32]:
    """The tokens [B, L] of captions by a model's tokenizer."""
    if not captions:
        return np.empty((0, 1), np.int32)
    return tokenizer(captions).numpy().astype(np.int32)


_tokenizer = cache(towers.tokenizer)


def pin(model: Model) -> Model:
    """The model with the weights that this process finds now and no others. Errors are those of `load`."""
    return model.pinned(sha256_of(weights_of(model)))


def weights_of(model: Model) -> Path:
    """The local file with the weights. Behind a URL, it is fetched."""
    if model.checkpoint is not None and "://" in model.checkpoint:
        return fetch(model.checkpoint, model.sha256)
    path = towers.weights_file(model.name, model.checkpoint)
    if model.sha256 is not None and (found := sha256_of(path)) != model.sha256:
        where = f"{path} on {os.uname().nodename}"
        raise OSError(f"{where} is another file than the driver has (sha256 {found[:12]}, not {model.sha256[:12]})")
    return path


def _arguments(model: Model) -> tuple[str, str | None, str | None, dict[str, Any]]:
    path = weights_of(model)
    preprocess = {} if model.preprocess is None else model.preprocess.model_dump(exclude_none=True)
    return model.name, None if model.checkpoint is None else str(path), model.pretrained_cfg, preprocess
