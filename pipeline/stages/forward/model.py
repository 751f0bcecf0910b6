"""Forward mode: the whole model in an actor, and what its stages share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from ecif import towers
from ecif.forward.mode import Batch, Parameters, choose, clip_logits, loss_gradient
from pipeline.config import Config
from pipeline.corpus.batches import segment
from pipeline.errors import UserError
from pipeline.run_folder import tensors as stored
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.fit.sample import choose_batches
from pipeline.stages.forward.decode import Decoded, Members, accepted, decode
from pipeline.stages.solve.targets import Target
from pipeline.workers.cluster import Resources, device
from pipeline.workers.progress import Stage

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


class Batches(Sequence[Batch]):
    """Decoded batches as the model takes them, made when they are asked for."""

    def __init__(self, model: Model, decoded: list[Decoded]):
        self.model, self.decoded = model, decoded

    def __len__(self) -> int:
        return len(self.decoded)

    def __getitem__(self, at: Any) -> Any:
        return self.model.batch(self.decoded[at])


def _gradient(fitted: str | None, members: list[Members], caption: str, rows: list[Any], config: Config) -> Any:
    model = Model(config, fitted)
    shards = model.read(members, caption)
    pixels, captions = np.concatenate([s.pixels for s in shards]), [text for s in shards for text in s.captions]
    batches = [Decoded(pixels[r], [captions[i] for i in r]) for r in rows]
    return loss_gradient(model.logits, model.parameters, Batches(model, batches)).cpu().numpy()
