"""Stage `solve`: the shared inverse-Hessian system, q = (H + damping I)^-1 grad L_T for every target and set of heads.

Actors hold slices of the sampled features and compute Gauss-Newton products. One of them sums these in fixed order, and takes
the conjugate gradient steps of all systems of a target together (`ecif.directions`). Objects that exist are read.
"""

import logging
from typing import Any, NamedTuple

import torch

from ecif.columns.evidence import Evidence
from ecif.columns.misalignment import Misalignment
from ecif.damping import SOLVED
from ecif.directions import Directions, HowToSolve, Refitted, solve_question
from ecif.heads.cross_fit import FittedHeads, HowToFit, Refit, removals
from ecif.sample import Sample
from ecif.slices import Shared
from ecif.system import gather_evidence, sample_bank
from ecif.targets import ENOUGH_COVERAGE
from ecif.targets.question import PARTS, Question
from pipeline import storage
from pipeline.console import say
from pipeline.errors import RunError
from pipeline.run_folder import tensors
from pipeline.run_folder.columns import evidence_scores
from pipeline.stages.fit.stage import ReadSample, refitter
from pipeline.stages.losses import loss_of
from pipeline.stages.solve.slices import SampleActors
from pipeline.stages.solve.targets import TargetFeatures
from pipeline.workers.progress import Stage
from pipeline.workers.run import Run


class Solved(NamedTuple):
    """The results of `solve`."""

    evidence: Evidence
    directions: dict[str, Directions]  # by target
    misalignment: Misalignment

    def facts(self) -> dict[str, dict[str, Any]]:
        """For run.json, by target: damping, its agreement with refits, residual, coverage and share of misaligned pairs.

        The share is None where it is unknown.
        """
        low, high = self.misalignment.interval
        share = {"misaligned": self.misalignment.known_share, "misaligned_at_least": low, "misaligned_at_most": high}
        return {
            name: found.calibration._asdict() | {"residual": found.residual, "coverage": found.coverage} | share
            for name, found in self.directions.items()
        }

    def warn(self) -> None:
        """Warn of targets whose directions are not solved, and of those that cover too few of the corpus's concepts."""
        for name, found in self.directions.items():
            if found.residual > SOLVED:
                say(
                    f"warning: target {name}: its directions are not solved (relative residual {found.residual:.2g} at damping "
                    f"{found.calibration.damping:g}): raise solve.iterations or solve.dampings",
                    logging.WARNING,
                )
            if found.coverage < ENOUGH_COVERAGE:
                say(
                    f"warning: target {name} covers {found.coverage:.0%} of the corpus's concepts; below {ENOUGH_COVERAGE:.0%} "
                    f"a filter by influence_{name} overfits it: give it more pairs, or filter by another column",
                    logging.WARNING,
                )


def solve(run: Run, how: HowToFit, fitted: FittedHeads, sample: ReadSample, targets: list[TargetFeatures]) -> Solved:
    """Score the sample, and solve for the directions of every target.

    Args:
        run: the run.
        how: how the heads were fitted.
        fitted: the fitted heads.
        sample: the pairs that they were fitted on.
        targets: their features.

    Raises:
        RunError: no change of the heads could improve a target, or all captions are alike.
    """
    keys = ["evidence", *(f"directions/{target.name}" for target in targets)]
    missing = [key for key in keys if not storage.exists(run.artifacts.url(key))]
    try:
        if missing:
            asked = [target.question(run.config) for target in targets if f"directions/{target.name}" in missing]
            _solve(run, how, fitted, sample(), asked)
        evidence = tensors.load(run.artifacts.url("evidence"), Evidence)
        found = {t.name: tensors.load(run.artifacts.url(f"directions/{t.name}"), Directions) for t in targets}

        def learn() -> Misalignment:
            real, planted = ([d.scores() for d in found.values()], [d.planted_scores() for d in found.values()])
            return evidence.misalignment(torch.cat(real), torch.cat(planted))

        return Solved(evidence, found, tensors.once(run.artifacts.url("misalignment"), Misalignment, learn))
    except ValueError as error:
        raise RunError(str(error)) from None


def _solve(run: Run, how: HowToFit, fitted: FittedHeads, sample: Sample, questions: list[Question]) -> None:
    """Compute and write the evidence and the directions that are missing.

    Targets are solved one after the other, because the Krylov bases of one target's systems are the largest tensors of all.
    """
    config, artifacts = run.config, run.artifacts
    for question in questions:
        question.gradient(fitted.full)  # raises ValueError before the work, if nothing can be improved
    solver = HowToSolve(config.solve.iterations, config.solve.dampings, config.seed)
    refits = config.solve.calibration_refits if questions else 0
    with Stage("solve", (1 + PARTS) * len(questions) * solver.iterations + refits) as progress:
        # The refits run before the actors start: both need the CPUs.
        removed = removals(len(sample.fold), refits, "calibrate", config.seed)
        jobs = [Refit(~without, config.seed) for without in removed]
        refit = refitter(run.resources, how, sample, progress)
        refitted = Refitted(removed, [path[-1] for path in refit(jobs)])
        shared = Shared(sample, fitted.every(), how.start, loss_of(config), sample_bank(sample, how.start, config.seed))
        with SampleActors(shared, fitted, config.repeats, run.resources, progress) as system:
            scores = [kind() for kind in evidence_scores(config)]
            tensors.once(artifacts.url("evidence"), Evidence, lambda: gather_evidence(system, scores, shared.bank))
            for question in questions:
                found = solve_question(system, fitted, question, refitted, solver)
                tensors.save(artifacts.url(f"directions/{question.name}"), found)
