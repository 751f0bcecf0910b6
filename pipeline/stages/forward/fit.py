"""Forward mode's `fit`: the chosen parameters, fitted on the sample."""

from typing import Any

import ray

from ecif.forward.fit import fit
from pipeline import storage
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.run_folder import tensors as stored
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.forward.decode import Members
from pipeline.stages.forward.model import Batches, Model, sample_batches
from pipeline.workers.cluster import Resources
from pipeline.workers.progress import Stage


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


def _fit(url: str, sample: list[Members], caption: str, config: Config) -> None:
    model = Model(config, None)
    parameters = fit(
        model.logits,
        model.parameters,
        Batches(model, model.read(sample, caption)),
        batch_size=config.batch_size,
        epochs=config.scoring.epochs,
        learning_rate=config.scoring.learning_rate,
        seed=config.seed,
    )
    if not all(p.isfinite().all() for p in parameters.values()):
        raise RunError("the fit of scoring.parameters diverged: lower scoring.learning_rate")
    stored.write(url, parameters, pairs=sum(len(batch.uid) for batch in sample))
