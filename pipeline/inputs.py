"""The inputs of a run: model, corpus and targets. They are checked before anything starts."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from ecif.checkpoint import ModelError
from ecif.towers import Towers
from pipeline import storage
from pipeline.config import Config
from pipeline.console import say
from pipeline.corpus import shards, sidecar
from pipeline.corpus.glance import glance
from pipeline.corpus.shards import Shard
from pipeline.errors import UserError
from pipeline.run_folder.artifacts import KINDS, fingerprint
from pipeline.run_folder.dataset import Dataset
from pipeline.sections import Model, Pairs, Reading
from pipeline.stages.embed.precision import begun_in, in_precision, settle
from pipeline.stages.embed.prompts import read_prompts
from pipeline.stages.forward.model import check_parameters
from pipeline.urls import masked
from pipeline.workers.cluster import Resources
from pipeline.workers.model import load, pin


def load_model(model: Model) -> Towers:
    """Load the model on the CPU of this machine, for its fingerprint, heads and preprocessing.

    Raises:
        UserError: the model is unknown, or its weights can't be loaded.
    """
    if model.checkpoints:
        raise UserError("model.checkpoints: `ecif plan` and judging know one only: use a run with one checkpoint")
    with _said_to_the_user(model):
        loaded = load(pin(model), named=True)
    for note in loaded.notes:
        say(note)
    return loaded


@contextmanager
def _said_to_the_user(model: Model) -> Iterator[None]:
    """Turn whatever the loading of a model raises into one line, without what is internal or secret."""
    try:
        yield
    except ModelError as error:
        raise UserError(_without_cache(str(error), model)) from None
    except OSError as error:
        raise UserError(f"model.checkpoint: {error}") from None
    except Exception as error:  # noqa: BLE001  (open_clip and transformers raise whatever their parts raise)
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
        raise UserError(f"model {model.name!r} can't be loaded: {text.splitlines()[0][:300]}") from None


def _without_cache(text: str, model: Model) -> str:
    """A file that was fetched is known by its URL."""
    if model.checkpoint is None or "://" not in model.checkpoint:
        return text
    return re.sub(r"\S*/checkpoints/[0-9a-f]{64}/\S*?(?=[:;,]? |$)", masked(model.checkpoint), text)


class Inputs(NamedTuple):
    """Everything that a run reads."""

    model: Towers
    corpus: Dataset
    targets: dict[str, Dataset]

    def datasets(self) -> dict[str, Dataset]:
        """The corpus and the targets, by the name that a user knows."""
        return {"corpus": self.corpus} | {f"target {name}": target for name, target in self.targets.items()}

    def name_features(self, config: Config) -> None:
        """Name the features after all that they depend on. Before a run was begun, nobody knows which precision `auto` is."""
        how, beside = made_by(self.model, config), self.corpus.sidecars
        uids = ["sidecar"] if beside and beside.uids else []
        self.corpus.fingerprint = _name([*how, *uids], self.corpus.reading, self.corpus.prompts)
        for target in self.targets.values():
            target.fingerprint = _name(how, target.reading, target.prompts)


def load_inputs(config: Config) -> Inputs:
    """Find every shard and load the model.

    Raises:
        UserError: shards, classes or the model can't be read.
    """
    corpus = shards.find(config.corpus.shards, "corpus.shards", config.corpus.root, config.corpus.missing)
    clean = {name: shards.find(p.shards, f"targets.{name}.shards", missing=p.missing) for name, p in config.targets.items()}
    prompts = {name: read_prompts(target, f"targets.{name}") for name, target in config.targets.items()}
    beside = sidecar.find(corpus, config.corpus.sidecar, config.corpus.uid == "sidecar", sidecar.LOOKED_AT)
    model = load_model(config.model)
    # Only the sigmoid loss needs a bias: a softmax does not change with a bias common to all logits.
    model.heads = model.heads._replace(
        train_logit_scale=config.fit.train_logit_scale, train_logit_bias=config.loss.kind.has_bias
    )
    of_corpus = as_dataset(config.run, config.corpus, corpus, [])
    of_corpus.sidecars, of_corpus.batched = beside, True
    folders = {name: storage.join(config.run, "targets", name) for name in clean}
    targets = {n: as_dataset(folders[n], config.targets[n], found, [], prompts[n]) for n, found in clean.items()}
    inputs = Inputs(model, of_corpus, targets)
    with suppress(OSError):  # whoever holds the folder says what is wrong with it
        config = in_precision(config, begun_in(config))
    inputs.name_features(config)
    return inputs


class Given(NamedTuple):
    """The configuration with one checkpoint of the model, and what a run with it reads."""

    config: Config
    inputs: Inputs


def load_each(config: Config) -> list[Given]:
    """Find every shard, look into some, and load the model, for each of its checkpoints.

    Raises:
        UserError: something can't be read, or no run of it is possible.
    """
    each = [config.model_copy(update={"model": model}) for model in config.model.each()]
    inputs = [load_inputs(one) for one in each]
    pinned = [one.model.pinned(read.model.sha256) for one, read in zip(each, inputs, strict=True)]
    each = [one.model_copy(update={"model": model}) for one, model in zip(each, pinned, strict=True)]
    for one in each:
        check_parameters(one)
    look_into(inputs[0].corpus, config)
    return list(map(Given, each, inputs))


def settle_each(config: Config, each: list[Given], resources: Resources) -> tuple[Config, list[Given]]:
    """The same, in the precision that the models of the cluster compute in. The features are named by it."""
    precision = settle(config, resources)
    settled = [Given(in_precision(one, precision), read) for one, read in each]
    for one, read in settled:
        read.name_features(one)
    return in_precision(config, precision), settled


def look_into(corpus: Dataset, config: Config) -> None:
    """Look into some shards of a corpus, and say what a user has to know before a run takes hours.

    Raises:
        UserError: no run of these shards is possible.
    """
    seen = glance(corpus.shards, corpus.reading.key, corpus.sidecars, config.embed)
    if seen.impossible:
        raise UserError(seen.impossible)
    for line in seen.said(config.batch_size):
        say(line)


def as_dataset(folder: str, pairs: Pairs, found: list[Shard], made_by: list[Any], prompts: Sequence[list[str]] = ()) -> Dataset:
    """A dataset with these shards, whose features go to a folder.

    Args:
        folder: the run, or a target's folder in it.
        pairs: how the pairs are read.
        found: the shards.
        made_by: what features depend on beside the way they are read, see `made_by`.
        prompts: the filled templates of each class, for a target whose images have classes.
    """
    return Dataset(folder, _name(made_by, pairs.reading, prompts), found, pairs.reading, prompts)


def _name(made_by: list[Any], reading: Reading, prompts: Sequence[list[str]]) -> str:
    versions = [KINDS[kind].version for kind in ("features", *(["prompts"] if prompts else []))]
    return fingerprint(versions, made_by, reading.named(), list(prompts))


def made_by(model: Towers, config: Config) -> list[Any]:
    """What the features of any pairs depend on: the model, and the limits within which pairs are read."""
    budgets = {"max_bad_fraction", "max_bad_fraction_of_shard"}  # these may end a run, and change no bytes
    return [model.fingerprint, config.embed.model_dump(exclude=budgets)]
