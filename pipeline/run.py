"""The recipe: the stages of a run, in order. Each writes whole objects and does only what is missing."""

import sys
from collections.abc import Sequence
from types import ModuleType

from ecif.targets.question import FEWEST
from pipeline import storage
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.inputs import Inputs, load_inputs, look_into
from pipeline.run_folder.artifacts import Artifacts
from pipeline.run_folder.contents import find_artifacts
from pipeline.run_folder.finished import Checkpoint, Finished, write_finished
from pipeline.run_folder.outcome import Outcome, account
from pipeline.run_folder.started import start
from pipeline.stages.embed.precision import in_precision, settle
from pipeline.stages.embed.prompts import embed_prompts
from pipeline.stages.embed.stage import embed
from pipeline.stages.filter import choose_filters
from pipeline.stages.fit.copies import group_sample
from pipeline.stages.fit.stage import choose_how_to_fit, fit_heads, how_to_fit
from pipeline.stages.forward.fit import fit_parameters
from pipeline.stages.forward.model import check_parameters
from pipeline.stages.forward.score import score_forward
from pipeline.stages.forward.solve import solve_forward
from pipeline.stages.index import index
from pipeline.stages.publish import Publication, publish
from pipeline.stages.repeats import counted
from pipeline.stages.score import score
from pipeline.stages.solve.second_order import prepare
from pipeline.stages.solve.stage import solve
from pipeline.stages.solve.targets import read_target
from pipeline.storage.lease import hold_folder
from pipeline.workers.cluster import Resources, session
from pipeline.workers.process import as_found
from pipeline.workers.run import Clock, Run


@as_found()
def run(config: Config, again: Sequence[str] = ()) -> Outcome:
    """Run every stage that the configuration asks for. The same call resumes: objects that exist are not computed again.

    Args:
        config: of the run.
        again: URLs of accounting objects to delete once the folder is held, so that their shards are read again.

    Raises:
        UserError: the corpus, the model or a target can't be read, or another run holds the folder. No stage has run then.
        RunError: a stage failed, the counts of pairs do not add up, or another run has taken over the folder.
    """
    each = [config.model_copy(update={"model": model}) for model in config.model.each()]
    inputs = [load_inputs(one) for one in each]
    each = [
        one.model_copy(update={"model": one.model.pinned(read.model.sha256)}) for one, read in zip(each, inputs, strict=True)
    ]
    for one in each:
        check_parameters(one)
    look_into(inputs[0].corpus, config)
    clock, pace = Clock(), dict[str, float | None]()
    with hold_folder(config.run), session(config.workers, config.device) as resources:
        precision = settle(config, resources)
        config, each = in_precision(config, precision), [in_precision(one, precision) for one in each]
        for one, read in zip(each, inputs, strict=True):
            read.name_features(one)
        start(config, [one.datasets() for one in inputs])
        for url in again:
            storage.delete(url)
        done = [_checkpoint(one, read, resources, clock, pace) for one, read in zip(each, inputs, strict=True)]
        corpus, checkpoints = inputs[0].corpus, [checkpoint for checkpoint, _ in done]
        publication = Publication(config, [artifacts for _, artifacts in done], corpus.sidecars)
        with clock.stage("publish"):
            published = publish(publication, corpus, resources)
        finished = counted(Finished(config.run, config, publication.id(), checkpoints), corpus.accounting(), resources)
        write_finished(finished)
    return account(finished, corpus, published, clock.seconds, pace)


def _checkpoint(
    config: Config, inputs: Inputs, resources: Resources, clock: Clock, pace: dict[str, float | None]
) -> tuple[Checkpoint, Artifacts]:
    """Run the stages up to `index` with one checkpoint of the model."""
    model, corpus, clean = inputs
    with clock.stage("embed"):
        pace["forward_pass"] = embed([corpus, *clean.values()], config.model, config.embed, model.preprocess, resources)
        embed_prompts(list(clean.values()), config.model, config.embed, resources)
        for name, target in clean.items():
            if sum(a.embedded for a in target.accounting().values()) < FEWEST:
                raise RunError(f"target {name}: fewer than {FEWEST} usable pairs, too little to ask; see its quarantine tables")
    this = Run(config, resources, find_artifacts(config, corpus, clean))

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
    with clock.stage("score"):
        pace["projection"] = score(this, model.heads, corpus, clean)
    if config.scoring.mode == "forward":
        with clock.stage("forward"):
            fit_parameters(this, corpus)
            for name, of_target in solve_forward(this, corpus, targets, clean, solved).items():
                facts[name]["forward"] = of_target
            pace["forward_mode"] = score_forward(this, corpus)
    if config.index:
        with clock.stage("index"):
            index(this, config.index, corpus, fitted, sample)
    return Checkpoint(corpus.fingerprint, this.artifacts.names, choice.facts, facts), this.artifacts


class _Recipe(ModuleType):
    """Makes this module callable, because it has the name of its function: `pipeline.run(config)` calls `run(config)`."""

    def __call__(self, config: Config) -> Outcome:
        return run(config)


sys.modules[__name__].__class__ = _Recipe
