"""The method on features in memory, with what a run keeps inside: the sample, the choice of the fit, and the chosen filter."""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.attribute import Settings
from ecif.batching import Shuffled
from ecif.columns.agreement import Agreement
from ecif.columns.clip_score import ClipScore
from ecif.columns.evidence import Evidence
from ecif.columns.held_out_cosine import HeldOutCosine
from ecif.columns.held_out_loss import HeldOutLoss
from ecif.copies import find_copies, pair_ids
from ecif.directions import Directions, HowToSolve, Refitted, solve_question
from ecif.evaluation import calibrated_loss
from ecif.filter_choice import ChosenFilter, HowToFilter, choose_filter
from ecif.fit_choice import Grid, choose_fit
from ecif.heads import Heads, standardised
from ecif.heads.cross_fit import NO_FIT, CrossFit, HowToFit, Job, Refit, removals, run_fits
from ecif.losses import CLIP
from ecif.sample import Sample
from ecif.slices import Shared
from ecif.system import LocalSystem, gather_evidence, sample_bank
from ecif.targets import TargetLoss
from ecif.targets.question import Question, deal


class Solved(NamedTuple):
    """A corpus in the order of its batches, and everything that was found out about it."""

    sample: Sample
    rows: Tensor  # [N] which pair of the corpus each pair of the sample is
    how: HowToFit
    evidence: Evidence
    question: Question
    directions: Directions
    chosen: ChosenFilter

    @property
    def probability(self) -> Tensor:
        """[N] of misalignment, as the filter knows it."""
        return self.chosen.misalignment.probability(self.evidence.of(self.directions.scores()))

    def test_loss(self, kept: Tensor, images: Tensor, texts: Tensor, seeds: int = 3) -> float:
        """Loss of heads that are fitted on some pairs, mean over seeds."""
        jobs = [Refit(kept, 100 + seed, True) for seed in range(seeds)]
        return sum(calibrated_loss(heads, images, texts) for heads in self.refit(jobs)) / seeds

    def refit(self, jobs: list[Refit]) -> list[Heads]:
        """The heads of some refits."""
        each = [(self.how.hyperparameters, job) for job in jobs]
        return [path[-1] for path in run_fits(self.how, self.sample.images, self.sample.texts, self.sample.batches(), each)]


def solve(images: Tensor, texts: Tensor, uids: list[str], heads: Heads, target: TargetLoss) -> Solved:
    """What a run does up to its filter, with default settings. All pairs are one shard, and all are sampled."""
    s = Settings()
    batches = Shuffled(s.batch_size, s.seed).of("", len(images))
    rows = torch.cat(batches)
    of_rows = [uids[row] for row in rows.tolist()]
    copies = find_copies(images[rows], texts[rows], of_rows, pair_ids("", rows), s.folds, s.seed)
    sample = Sample(images[rows], texts[rows], copies.fold, [len(batch) for batch in batches], copies.group)
    start = standardised(heads)
    how = HowToFit(start, CLIP, s.batch_size, NO_FIT)

    def fits(jobs: list[Job]) -> list[list[Heads]]:
        return run_fits(how, sample.images, sample.texts, sample.batches(), jobs)

    chosen = choose_fit(how, sample, Grid.of(None, None, None, s.checkpoints), fits, s.seed).hyperparameters
    how = how._replace(hyperparameters=chosen)
    cross_fit = CrossFit(s.folds, s.seeds, s.checkpoints, s.seed)

    def refit(jobs: list[Refit]) -> list[list[Heads]]:
        return fits([(chosen, job) for job in jobs])

    fitted = cross_fit.gather(refit(cross_fit.jobs(sample.fold)))
    bank = sample_bank(sample, start, s.seed)
    system = LocalSystem(fitted, Shared(sample, fitted.every(), start, CLIP, bank), s.how_often())
    evidence = gather_evidence(system, [ClipScore(), HeldOutCosine(), HeldOutLoss(), Agreement()], bank)
    removed = removals(len(rows), s.refits, "calibrate", s.seed)
    refitted = Refitted(removed, [path[-1] for path in refit([Refit(~without, s.seed) for without in removed])])
    question = deal("clean", target, s.target_batch, s.seed)
    directions = solve_question(system, fitted, question, refitted, HowToSolve(s.iterations, list(s.dampings), s.seed))
    choice = choose_filter(question, sample, evidence, directions, refit, HowToFilter(s.filter_seeds, s.seed))
    return Solved(sample, rows, how, evidence, question, directions, choice)
