"""Forward mode: what its stages share, and its first one, the fit of the chosen parameters on the sample."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from ecif import towers
from ecif.forward_fit import fit
from ecif.forward_mode import Batch, Parameters, choose, clip_logits, loss_gradient
from pipeline import heads as stored
from pipeline import storage
from pipeline.cluster import Resources, device
from pipeline.config import Config
from pipeline.dataset import Dataset
from pipeline.decode import Decoded, Members, accepted, decode
from pipeline.errors import RunError, UserError
from pipeline.progress import Stage
from pipeline.sample import choose_batches
from pipeline.shards import segment
from pipeline.targets import Target

CHUNK = 32  # pairs whose activations are kept at a time, some 60 MB each for ViT-B/32; part of what sums depend on


def check(config: Config) -> None:
    """Before anything starts: in forward mode, the patterns choose parameters that can be differentiated.

    Raises:
        UserError: they do not.
    """
    if config.scoring.mode == "heads":
        return
    try:
        choose(towers.load_whole(config.model.name, config.model.checkpoint).model, config.scoring.parameters)
    except ValueError as error:
        raise UserError(f"scoring.parameters: {error}") from None


class Model:
    """The whole model in an actor, as a function of the chosen parameters.

    Args:
        config: of the run.
        fitted: where `fit_parameters` left them; None for the checkpoint's own.
    """

    def __init__(self, config: Config, fitted: str | None):
        self.device = device()
        self.config = config
        model, self.tokenizer, self.preprocess = towers.load_whole(config.model.name, config.model.checkpoint)
        model = model.to(self.device)
        self.parameters = choose(model, config.scoring.parameters)
        if fitted:
            self.parameters = {name: p.to(self.device) for name, p in read_parameters(fitted, self.parameters).items()}
        self.logits = clip_logits(model, CHUNK)

    def batch(self, decoded: Decoded) -> Batch:
        """What the model takes, on its device."""
        pixels = torch.tensor(decoded.pixels).to(self.device)
        return towers.normalised(pixels, self.preprocess), self.tokenizer(decoded.captions).to(self.device)

    def read(self, batches: list[Members], caption: str) -> list[Decoded]:
        """Some batches' pixels, to keep: a quarter of what float32 takes."""
        return list(decode(batches, caption, self.config, self.preprocess))


def sample_batches(corpus: Dataset, config: Config) -> list[Members]:
    """Whole batches of the corpus, those of smallest hash, up to `scoring.sample` pairs; in the order of the shards."""
    done = corpus.accounting()
    chosen = choose_batches(done, config, config.scoring.sample)
    batches = []
    for shard in (s for s in corpus.shards if s.name in chosen):
        pairs = accepted(corpus, shard, done[shard.name].parts)
        rows = segment(len(pairs.uid), config.batch_size, shard.name, config.seed)
        batches += [pairs.take(rows[i]) for i in sorted(chosen[shard.name])]
    return batches


def fit_parameters(url: str, corpus: Dataset, config: Config, resources: Resources) -> str | None:
    """Fit the chosen parameters on the sample once, unless that is done; returns where they are, None for the checkpoint's."""
    if not config.scoring.epochs:
        return None
    if not storage.exists(url):
        with Stage("forward fit", 1) as progress:
            run: Any = ray.remote(**resources.actor, max_retries=2)(_fit)
            ray.get(run.remote(url, sample_batches(corpus, config), corpus.caption, config))
            progress.advance(1)
    return url


def read_parameters(url: str, like: Parameters) -> Parameters:
    """Parameters that `fit_parameters` wrote, in the order of `like`."""
    tensors, _ = stored.read(url)
    return {name: tensors[name] for name in like}


def target_gradients(
    fitted: str | None, targets: list[Target], clean: dict[str, Dataset], config: Config, resources: Resources, progress: Stage
) -> Tensor:
    """[T, P] gradient of each target's summed loss, float32."""
    run: Any = ray.remote(**resources.actor, max_retries=2)(_gradient)
    pending = []
    for target in targets:
        dataset = clean[target.name]
        done = dataset.accounting()
        members = [accepted(dataset, shard, done[shard.name].parts) for shard in dataset.shards if done[shard.name].embedded]
        rows = [batch.numpy() for batch in target.batches(config)]
        pending.append(run.remote(fitted, members, dataset.caption, rows, config))
    gradients = []
    for result in pending:
        gradients.append(ray.get(result))
        progress.advance(1)
    return torch.from_numpy(np.stack(gradients))


class _Batches(Sequence[Batch]):
    """Decoded batches as the model takes them, made when they are asked for."""

    def __init__(self, model: Model, decoded: list[Decoded]):
        self.model, self.decoded = model, decoded

    def __len__(self) -> int:
        return len(self.decoded)

    def __getitem__(self, at: Any) -> Any:
        return self.model.batch(self.decoded[at])


def _fit(url: str, sample: list[Members], caption: str, config: Config) -> None:
    model = Model(config, None)
    parameters = fit(
        model.logits,
        model.parameters,
        _Batches(model, model.read(sample, caption)),
        batch_size=config.batch_size,
        epochs=config.scoring.epochs,
        learning_rate=config.scoring.learning_rate,
        seed=config.seed,
    )
    if not all(p.isfinite().all() for p in parameters.values()):
        raise RunError("the fit of scoring.parameters diverged: lower scoring.learning_rate")
    stored.write(url, parameters, pairs=sum(len(batch.uid) for batch in sample))


def _gradient(fitted: str | None, members: list[Members], caption: str, rows: list[Any], config: Config) -> Any:
    model = Model(config, fitted)
    shards = model.read(members, caption)
    pixels, captions = np.concatenate([s.pixels for s in shards]), [text for s in shards for text in s.captions]
    batches = [Decoded(pixels[r], [captions[i] for i in r]) for r in rows]
    return loss_gradient(model.logits, model.parameters, _Batches(model, batches)).cpu().numpy()
