"""What a run starts from, checked before anything is started: the model, the corpus, the targets."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from ecif import towers
from pipeline import storage
from pipeline.config import Config, Model, Pairs
from pipeline.corpus import shards, sidecar
from pipeline.corpus.shards import Shard
from pipeline.errors import UserError
from pipeline.run_folder.artifacts import fingerprint
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.embed.prompts import read_prompts


def load_model(model: Model) -> towers.Towers:
    """The model on this machine's CPU: its fingerprint, heads and preprocessing.

    Raises:
        UserError: it is unknown, or its weights can't be had.
    """
    if model.checkpoints:
        raise UserError("model.checkpoints: `ecif plan` and judging know one only: use a run with one checkpoint")
    if model.checkpoint is not None and not os.path.isfile(model.checkpoint):
        raise UserError(f"model.checkpoint: no file {model.checkpoint}")
    try:
        return towers.load(model.name, model.checkpoint)
    except Exception as error:  # noqa: BLE001  (open_clip raises whatever its parts raise)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model {model.name!r} can't be loaded: {first[:300]}") from None


class Inputs(NamedTuple):
    """Everything that a run reads."""

    model: towers.Towers
    corpus: Dataset
    targets: dict[str, Dataset]


def load_inputs(config: Config) -> Inputs:
    """Find every shard and load the model.

    Raises:
        UserError: shards, classes or a model that can't be had.
    """
    corpus = shards.find(config.corpus.shards, "corpus.shards")
    clean = {name: shards.find(pairs.shards, f"targets.{name}.shards") for name, pairs in config.targets.items()}
    prompts = {name: read_prompts(target, f"targets.{name}") for name, target in config.targets.items()}
    beside = sidecar.find(corpus, config.corpus.sidecar, config.corpus.uid == "sidecar")
    model = load_model(config.model)
    # No softmax sees a bias common to all logits; the sigmoid loss has no sensible fit without it.
    model.heads = model.heads._replace(
        train_logit_scale=config.fit.train_logit_scale, train_logit_bias=config.loss.kind.has_bias
    )
    return Inputs(
        model,
        as_dataset(config.run, config.corpus, corpus, config, model, sidecars=beside),
        {
            name: as_dataset(
                storage.join(config.run, "targets", name), config.targets[name], found, config, model, prompts[name]
            )
            for name, found in clean.items()
        },
    )


def as_dataset(
    folder: str,
    pairs: Pairs,
    found: list[Shard],
    config: Config,
    model: towers.Towers,
    prompts: Sequence[list[str]] = (),
    sidecars: sidecar.Sidecars | None = None,
) -> Dataset:
    """Shards, and the folder that their features go to."""
    budgets = {"max_bad_fraction", "max_bad_fraction_of_shard"}  # what may end a run changes no bytes
    limits = config.embed.model_dump(exclude=budgets)
    uids = ["sidecar"] if sidecars and sidecars.uids else []
    made_by = [model.fingerprint, pairs.caption, limits, *uids, *([prompts] if prompts else [])]
    return Dataset(folder, fingerprint(*made_by), found, pairs.caption, prompts, sidecars)
