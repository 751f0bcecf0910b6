"""Refits of the heads outside of a run, as the run itself makes them."""

from ecif.heads import Heads
from ecif.heads.cross_fit import Refitter
from ecif.sample import Sample
from pipeline.config import Config
from pipeline.inputs import load_inputs
from pipeline.run_folder.contents import find_artifacts
from pipeline.stages.fit.stage import choose_how_to_fit, how_to_fit, refitter
from pipeline.workers.cluster import Resources
from pipeline.workers.run import Run


def refitter_of(config: Config, resources: Resources, start: Heads, sample: Sample) -> Refitter:
    """Runs fits with the hyperparameters that the run of a configuration chose, or chooses them. Its features are there."""
    _, corpus, clean = load_inputs(config)
    choice = choose_how_to_fit(Run(config, resources, find_artifacts(config, corpus, clean)), start, lambda: sample)
    return refitter(resources, how_to_fit(config, start, choice.hyperparameters), sample)
