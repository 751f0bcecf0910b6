"""Forward mode: the whole model in an actor, and what its stages share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ecif import towers
from ecif.forward.mode import Batch, choose_parameters, clip_logits
from pipeline.config import Config
from pipeline.corpus.batches import batches_of
from pipeline.errors import UserError
from pipeline.run_folder.contents import sampled
from pipeline.run_folder.dataset import Dataset
from pipeline.sections import Reading
from pipeline.stages.forward.decode import Decoded, Members, accepted, decode
from pipeline.workers.cluster import device
from pipeline.workers.model import load_uncut

CHUNK = 32  # pairs whose activations are in memory at once, some 60 MB each for ViT-B/32; the order of sums depends on it


def check_parameters(config: Config) -> int:
    """The number of parameters that forward mode moves; 0 in mode `heads`.

    Raises:
        UserError: the patterns match no parameter, or one that can't be differentiated.
    """
    if config.scoring.mode == "heads":
        return 0
    try:
        model = load_uncut(config.model).model
        chosen = choose_parameters(model, config.scoring.parameters)
    except ValueError as error:
        raise UserError(f"scoring.parameters: {error}") from None
    return sum(parameter.numel() for parameter in chosen.values())


class ForwardModel:
    """The whole model in an actor, as a function of the chosen parameters.

    Args:
        config: of the run.
        fitted: the fitted values of these parameters, in the model's order; None for the values of the checkpoint.
    """

    def __init__(self, config: Config, fitted: list[Tensor] | None):
        self.device = device()
        self.config = config
        loaded = load_uncut(config.model)
        self.tokenizer, self.preprocess, model = loaded.tokenizer, loaded.preprocess, loaded.model.to(self.device)
        self.parameters = choose_parameters(model, config.scoring.parameters)
        if fitted is not None:
            self.parameters = {name: p.to(self.device) for name, p in zip(self.parameters, fitted, strict=True)}
        self.logits = clip_logits(model, CHUNK)

    def batch(self, decoded: Decoded) -> Batch:
        """A decoded batch as the model takes it, on the model's device."""
        pixels = torch.tensor(decoded.pixels).to(self.device)
        return towers.normalised(pixels, self.preprocess), self.tokenizer(decoded.captions).to(self.device)

    def read(self, batches: list[Members], reading: Reading) -> list[Decoded]:
        """Decode batches to keep in memory. As uint8 they take a quarter of the memory of float32."""
        return list(decode(batches, reading, self.config, self.preprocess))


def sample_batches(corpus: Dataset, config: Config) -> list[Members]:
    """Whole batches of the corpus of smallest hash, up to `scoring.sample` pairs, in the order of the shards."""
    done = corpus.accounting()
    chosen = sampled(config, done, config.scoring.sample)
    batches = []
    for shard in (s for s in corpus.shards if s.name in chosen):
        pairs = accepted(corpus, shard, done[shard.name].parts)
        rows = batches_of(config).of(shard.name, len(pairs.uid))
        batches += [pairs.take(rows[i].numpy()) for i in chosen[shard.name]]
    return batches


class Batches(Sequence[Batch]):
    """Decoded batches as the model takes them. Each is made when it is asked for."""

    def __init__(self, model: ForwardModel, decoded: list[Decoded]):
        self.model, self.decoded = model, decoded

    def __len__(self) -> int:
        return len(self.decoded)

    def __getitem__(self, at: Any) -> Any:
        return self.model.batch(self.decoded[at])
