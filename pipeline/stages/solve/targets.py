"""Targets in a run: their features, and the question that is asked about them."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ecif.targets import TargetData
from ecif.targets.question import Question, deal
from pipeline.config import Config
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.embed.prompts import read_prompt_features
from pipeline.stages.fit.sample import read_all, read_labels, read_uids
from pipeline.stages.fit.stage import as_features


class TargetFeatures(NamedTuple):
    """The features of a target."""

    name: str
    images: NDArray[np.float16]  # [N, d_x]
    texts: NDArray[np.float16]  # [N, d_t]
    labels: NDArray[np.int32] | None = None  # [N] classes, of a labelled target
    prompts: NDArray[np.float16] | None = None  # [C, M, d_t] M prompts for each of C classes, of a labelled target
    image: NDArray[np.int64] | None = None  # [N] equal for pairs of one image, of a target whose images have several captions

    def question(self, config: Config) -> Question:
        """The question that a run asks about the target. Its tensors are on the CPU."""
        to, settings = torch.device("cpu"), config.targets[self.name]
        data = TargetData(
            as_features(self.images, to),
            as_features(self.texts, to),
            None if self.labels is None else torch.from_numpy(self.labels.astype(np.int64)),
            None if self.prompts is None else as_features(self.prompts, to),
            config.loss.build(),
        )
        loss = settings.kind.of(data, **settings.options)
        image = None if self.image is None else torch.from_numpy(self.image)
        return deal(self.name, loss, config.solve.target_batch, config.seed, image)


def read_target(name: str, data: Dataset) -> TargetFeatures:
    """The features of a target."""
    prompts = read_prompt_features(data) if data.prompts else None
    image = np.unique(read_uids(data), return_inverse=True)[1].astype(np.int64) if data.reading.pick == "all" else None
    return TargetFeatures(name, *read_all(data), read_labels(data), prompts, image)
