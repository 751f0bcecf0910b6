"""Stage `filter`: which pairs to keep for a target, chosen by refits of the heads (`ecif.filter_choice`)."""

from ecif.filter_choice import ChosenFilter, HowToFilter, choose_filter
from ecif.heads.cross_fit import HowToFit
from pipeline.run_folder import tensors
from pipeline.sections import Filter
from pipeline.stages.fit.stage import ReadSample, refitter
from pipeline.stages.solve.stage import Solved
from pipeline.stages.solve.targets import TargetFeatures
from pipeline.workers.progress import Stage
from pipeline.workers.run import Run


def choose_filters(
    run: Run, settings: Filter, how: HowToFit, sample: ReadSample, targets: list[TargetFeatures], solved: Solved
) -> dict[str, ChosenFilter]:
    """Choose a filter for every target. A choice that exists is read.

    Args:
        run: the run.
        settings: the candidates.
        how: how heads are fitted.
        sample: the pairs that heads are refitted on, without those that a candidate drops.
        targets: their features.
        solved: the results of `solve`.

    Returns:
        The filters, by target.
    """
    candidates = HowToFilter(settings.seeds, run.config.seed)

    def choose(target: TargetFeatures) -> ChosenFilter:
        question, directions, pairs = target.question(run.config), solved.directions[target.name], sample()
        with Stage("filter", candidates.fits()) as progress:
            refit = refitter(run.resources, how, pairs, progress)
            return choose_filter(question, pairs, solved.evidence, directions, refit, candidates)

    def once(target: TargetFeatures) -> ChosenFilter:
        return tensors.once(run.artifacts.url(f"filter/{target.name}"), ChosenFilter, lambda: choose(target))

    return {target.name: once(target) for target in targets}
