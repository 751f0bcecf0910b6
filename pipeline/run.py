"""The recipe: the stages of a run, in order. Each writes whole objects and does only what is missing."""

import sys
from collections.abc import Sequence
from types import ModuleType

from pipeline import storage
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.inputs import Given, load_each, settle_each
from pipeline.learn import embed_given, learn
from pipeline.run_folder.artifacts import Artifacts
from pipeline.run_folder.contents import find_artifacts
from pipeline.run_folder.finished import Checkpoint, Finished, write_finished
from pipeline.run_folder.generations import Generations
from pipeline.run_folder.outcome import Outcome, account
from pipeline.run_folder.started import start
from pipeline.stages.forward.fit import fit_parameters
from pipeline.stages.forward.score import score_forward
from pipeline.stages.forward.solve import solve_forward
from pipeline.stages.index import index
from pipeline.stages.publish import Publication, publish
from pipeline.stages.repeats import counted
from pipeline.stages.score import score
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
    each = load_each(config)
    clock, pace = Clock(), dict[str, float | None]()
    with hold_folder(config.run):
        if Generations(config.run).exist():
            raise UserError(f"run: {config.run} has generations: `ecif nightly` adds to them; or use another run folder")
        with session(config.workers, config.device) as resources:
            config, each = settle_each(config, each, resources)
            start(config, [read.datasets() for _, read in each])
            for url in again:
                storage.delete(url)
            done = [_checkpoint(one, resources, clock, pace) for one in each]
            corpus, checkpoints = each[0].inputs.corpus, [checkpoint for checkpoint, _ in done]
            publication = Publication(config, [artifacts for _, artifacts in done], corpus.sidecars)
            with clock.stage("publish"):
                published = publish(publication, corpus, resources)
            finished = counted(Finished(config.run, config, publication.id(), checkpoints), corpus.accounting(), resources)
            write_finished(finished)
    return account(finished, corpus, published, clock.seconds, pace)


def _checkpoint(
    given: Given, resources: Resources, clock: Clock, pace: dict[str, float | None]
) -> tuple[Checkpoint, Artifacts]:
    """Run the stages up to `index` with one checkpoint of the model."""
    config, (model, corpus, clean) = given
    with clock.stage("embed"):
        pace["forward_pass"] = embed_given(given, corpus, resources)
    this = Run(config, resources, find_artifacts(config, corpus, clean))
    learned = learn(this, given.inputs, clock)
    with clock.stage("score"):
        pace["projection"] = score(this, model.heads, corpus, clean)
    if config.scoring.mode == "forward":
        with clock.stage("forward"):
            fit_parameters(this, corpus)
            for name, of_target in solve_forward(this, corpus, learned.targets, clean, learned.solved).items():
                learned.facts[name]["forward"] = of_target
            pace["forward_mode"] = score_forward(this, corpus)
    if config.index:
        with clock.stage("index"):
            index(this, config.index, corpus, learned.fitted, learned.sample)
    return Checkpoint(corpus.fingerprint, this.artifacts.names, learned.fit, learned.facts), this.artifacts


class _Recipe(ModuleType):
    """Makes this module callable, because it has the name of its function: `pipeline.run(config)` calls `run(config)`."""

    def __call__(self, config: Config) -> Outcome:
        return run(config)


sys.modules[__name__].__class__ = _Recipe
