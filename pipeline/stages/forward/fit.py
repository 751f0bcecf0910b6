"""Forward mode's `fit`: the chosen parameters, fitted on the sample."""

from typing import Any, NamedTuple

import ray
from torch import Tensor

from ecif.forward.fit import fit
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.run_folder import tensors
from pipeline.run_folder.dataset import Dataset
from pipeline.sections import Reading
from pipeline.stages.forward.decode import Members
from pipeline.stages.forward.model import Batches, ForwardModel, sample_batches
from pipeline.workers.progress import Stage
from pipeline.workers.run import Run


class FittedParameters(NamedTuple):
    """The chosen parameters at the end of the fit, in the model's order."""

    names: list[str]
    values: list[Tensor]


def fit_parameters(run: Run, corpus: Dataset) -> None:
    """Fit the chosen parameters on the sample, unless they exist or `scoring.epochs` is 0."""
    if "parameters" not in run.artifacts.names:
        return

    def make() -> FittedParameters:
        with Stage("forward fit", 1) as progress:
            task: Any = ray.remote(**run.resources.actor, max_retries=2)(_fit)
            found = ray.get(task.remote(sample_batches(corpus, run.config), corpus.reading, run.config))
            progress.advance(1)
        return found

    tensors.once(run.artifacts.url("parameters"), FittedParameters, make)


def _fit(sample: list[Members], reading: Reading, config: Config) -> FittedParameters:
    model = ForwardModel(config, None)
    parameters = fit(
        model.logits,
        model.parameters,
        Batches(model, model.read(sample, reading)),
        batch_size=config.batch_size,
        epochs=config.scoring.epochs,
        learning_rate=config.scoring.learning_rate,
        seed=config.seed,
    )
    if not all(p.isfinite().all() for p in parameters.values()):
        raise RunError("the fit of scoring.parameters diverged: lower scoring.learning_rate")
    return FittedParameters(list(parameters), [p.detach().cpu() for p in parameters.values()])
