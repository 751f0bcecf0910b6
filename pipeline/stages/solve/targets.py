"""Targets in a run: their features, what is asked about them, and how much of the corpus they ask about."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif import targets
from ecif.heads import Heads, embed
from ecif.targets import TargetData, TargetLoss
from pipeline.config import Config
from pipeline.config import Target as Settings
from pipeline.corpus.batches import permutation
from pipeline.errors import RunError
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.embed.prompts import read_prompt_features
from pipeline.stages.fit.sample import Sample, read_all, read_labels
from pipeline.stages.fit.stage import as_features
from pipeline.stages.losses import loss_of

CALIBRATION_GROUPS = 8  # parts of a target whose losses are predicted separately
COVERED_CAPTIONS = 1024  # distinct captions of the corpus that coverage is measured on


class Target(NamedTuple):
    """A clean set: its improvement counts."""

    name: str
    settings: Settings
    images: NDArray[np.float16]  # [N, d_x]
    texts: NDArray[np.float16]  # [N, d_t]
    labels: NDArray[np.int32] | None = None  # [N], with classes
    prompts: NDArray[np.float16] | None = None  # [C, M, d_t], with classes

    def halves(self, config: Config) -> list[list[Tensor]]:
        """Rows that share a softmax in the target's loss, in two halves: one asks, the other judges what is done about it."""
        order = torch.from_numpy(permutation(len(self.images), "target", self.name, config.seed))
        return [_batches(half, config.solve.target_batch) for half in order.tensor_split(2)]

    def batches(self, config: Config) -> list[Tensor]:
        """Rows that share a softmax in the target's loss, of both halves."""
        return [batch for half in self.halves(config) for batch in half]

    def loss(self, device: torch.device, config: Config) -> TargetLoss:
        """What is asked about it."""
        data = TargetData(
            as_features(self.images, device),
            as_features(self.texts, device),
            None if self.labels is None else torch.from_numpy(self.labels.astype(np.int64)).to(device),
            None if self.prompts is None else as_features(self.prompts, device),
            loss_of(config),
        )
        return self.settings.kind.of(data, **self.settings.options)


def _batches(order: Tensor, size: int) -> list[Tensor]:
    parts = list(order.split(size))
    if len(parts) > 1 and (2 * len(parts[-1]) < size or len(parts[-1]) < 2):
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def read_targets(clean: dict[str, Dataset], config: Config) -> list[Target]:
    """Every target of a run, in the order of their names."""
    return [
        Target(
            name,
            config.targets[name],
            *read_all(data),
            read_labels(data),
            read_prompt_features(data) if data.prompts else None,
        )
        for name, data in clean.items()
    ]


def groups(target: Target, config: Config) -> list[list[Tensor]]:
    """The target's batches in up to CALIBRATION_GROUPS parts of about the same size."""
    batches = target.batches(config)
    count = min(CALIBRATION_GROUPS, len(batches))
    return [batches[i::count] for i in range(count)]


def gradient(heads: Heads, target: Target, batches: list[Tensor], config: Config) -> Tensor:
    """Gradient [P] of the target's loss on some of its batches.

    Raises:
        RunError: it is zero: no change of the heads could improve the target.
    """
    found = target.loss(heads.image.device, config).gradient(heads, batches)
    if not found.any():
        raise RunError(f"target {target.name}: its loss {target.settings.loss} has no gradient, nothing is left to improve")
    return found


def group_losses(heads: Heads, target: Target, config: Config) -> Tensor:
    """[G] the loss of each calibration group of a target under these heads."""
    loss = target.loss(heads.image.device, config)
    return torch.stack([loss.value(heads, group) for group in groups(target, config)])


def target_loss(heads: Heads, target: Target, config: Config, rows: Tensor | None = None) -> float:
    """The target's loss a pair, all pairs in one batch, at the best temperature where it has one: for comparing models.

    Args:
        rows: of the target; all of them by default.
    """
    rows = torch.arange(len(target.images)) if rows is None else rows
    return target.loss(heads.image.device, config).mean(heads, rows.to(heads.image.device))


def coverage(heads: Heads, target: Target, sample: Sample, config: Config) -> float:
    """How much of the sampled corpus a target asks about, 0 to 1, see `ecif.targets.coverage`."""
    captions = np.unique(sample.texts, axis=0)
    chosen = captions[permutation(len(captions), "coverage", config.seed)[:COVERED_CAPTIONS]]
    to = heads.image.device
    no_image = as_features(sample.images[:0], to)
    of_corpus, of_target = (embed(heads, no_image, as_features(texts, to)).u for texts in (chosen, target.texts))
    return targets.coverage(of_corpus, of_target)
