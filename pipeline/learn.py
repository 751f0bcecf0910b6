"""The recipe up to what all shards share: features, then heads, directions and filters, learned from a sample of the corpus."""

from typing import Any, NamedTuple

from ecif.heads.cross_fit import FittedHeads
from ecif.targets.question import FEWEST
from pipeline.errors import RunError
from pipeline.inputs import Given, Inputs
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.embed.prompts import embed_prompts
from pipeline.stages.embed.stage import embed
from pipeline.stages.filter import choose_filters
from pipeline.stages.fit.copies import group_sample
from pipeline.stages.fit.stage import ReadSample, choose_how_to_fit, fit_heads, how_to_fit
from pipeline.stages.solve.second_order import prepare
from pipeline.stages.solve.stage import Solved, solve
from pipeline.stages.solve.targets import TargetFeatures, read_target
from pipeline.workers.cluster import Resources
from pipeline.workers.run import Clock, Run


class Learned(NamedTuple):
    """What was learned with one checkpoint of the model."""

    fit: dict[str, Any]  # how the heads were fitted, for run.json
    facts: dict[str, Any]  # by target, for run.json
    sample: ReadSample
    fitted: FittedHeads
    targets: list[TargetFeatures]
    solved: Solved


def embed_given(given: Given, corpus: Dataset, resources: Resources) -> float | None:
    """Embed a corpus, or a part of it, and the targets. Returns seconds a pair, see `embed`.

    Raises:
        RunError: see `embed`; or a target has too few usable pairs.
    """
    config, (model, _, clean) = given
    pace = embed([corpus, *clean.values()], config.model, config.embed, model.preprocess, resources)
    embed_prompts(list(clean.values()), config.model, config.embed, resources)
    for name, target in clean.items():
        whole = len(target.accounting()) == len(target.shards)  # else it is late, and the next night goes on
        if whole and sum(a.embedded for a in target.accounting().values()) < FEWEST:
            raise RunError(f"target {name}: fewer than {FEWEST} usable pairs, too little to ask; see its quarantine tables")
    return pace


def learn(this: Run, inputs: Inputs, clock: Clock) -> Learned:
    """Fit the heads, solve for the directions of every target, and choose the filters. What exists is read."""
    config, (model, corpus, clean) = this.config, inputs
    with clock.stage("fit"):
        sample = group_sample(this, corpus)
        choice = choose_how_to_fit(this, model.heads, sample)
        how = how_to_fit(config, model.heads, choice.hyperparameters)
        fitted = fit_heads(this, how, sample)
    with clock.stage("solve"):
        targets = [read_target(name, dataset) for name, dataset in clean.items()]
        solved = solve(this, how, fitted, sample, targets)
        facts = solved.facts()
        solved.warn()
        if config.score.order == 2:
            prepare(this, fitted, sample, targets, solved)
    if config.filter:
        with clock.stage("filter"):
            for name, chosen in choose_filters(this, config.filter, how, sample, targets, solved).items():
                facts[name]["filter"] = chosen.facts
    return Learned(choice.facts, facts, sample, fitted, targets, solved)
