"""The whole method on features in memory: what a run does to a corpus, without Ray and without files.

    scores = attribute(images, texts, {"coco": Contrastive(x, t)}, heads=load("ViT-B-32", path).heads)
    worst = scores["misalignment"].argsort(descending=True)

A run (`ecif run`) takes the same steps, distributed over workers. A test compares a run's columns with those of `attribute`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecif.batching import Batching, Shuffled, choose_batches
from ecif.columns import Column, HeldOutPairs, PairScore, held_out_values
from ecif.columns.agreement import Agreement, agreement_with_target
from ecif.columns.bank import Bank
from ecif.columns.clip_score import ClipScore
from ecif.columns.held_out_cosine import HeldOutCosine
from ecif.columns.held_out_loss import HeldOutLoss
from ecif.columns.influence import held_out_influence
from ecif.columns.near import nearness
from ecif.copies import COPIES, OfPairs, find_copies, pair_ids
from ecif.directions import HowToSolve, Refitted, solve_question
from ecif.filter_choice import HowToFilter, choose_filter
from ecif.fit_choice import Grid, choose_fit
from ecif.heads import Heads, standardised
from ecif.heads.cross_fit import NO_FIT, CrossFit, HowToFit, Job, Refit, Refitter, removals, run_fits
from ecif.losses import CLIP, Loss
from ecif.registry import find_kind
from ecif.sample import Sample
from ecif.slices import Shared
from ecif.system import LocalSystem, gather_evidence, sample_bank
from ecif.targets import TargetLoss
from ecif.targets.question import deal


@dataclass(frozen=True)
class Settings:
    """Settings of `attribute`. Names and defaults are those of a run's configuration; `ecif config` explains them."""

    loss: Loss = CLIP
    batch_size: int = 256
    seed: int = 0
    sample: int = 65_536  # fit.sample
    folds: int = 5
    seeds: int = 1
    epochs: int | None = None  # None has it chosen by held-out pairs
    learning_rate: float | None = None
    pull: float | None = None
    checkpoints: int = 2
    train_logit_scale: bool = False
    iterations: int = 24  # solve.iterations
    refits: int = 16
    dampings: Sequence[float] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
    target_batch: int = 50
    repeats: int | None = None  # score.repeats
    columns: Sequence[str] = ()  # score.columns
    filter: bool = True
    filter_seeds: int = 2

    def how_often(self) -> int:
        """The number of batch permutations that scores are averaged over."""
        return self.repeats or min(4, max(1, 1024 // self.batch_size))


def attribute(
    images: Tensor,
    texts: Tensor,
    targets: dict[str, TargetLoss],
    *,
    heads: Heads,
    settings: Settings = Settings(),
    uids: Sequence[str] | None = None,
    shards: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Score pairs: the influence of each pair on every target, and whether its image and caption belong together.

    Args:
        images: [N, d_x] unit-norm trunk features of the images, float16 or float32. Computation is in float32, on the CPU.
        texts: [N, d_t] unit-norm trunk features of the captions; row n belongs to image n.
        targets: clean sets and the losses on them, by name. Influence is measured on these losses.
        heads: the model's own heads, such as `ecif.load(...).heads`.
        settings: see `Settings`.
        uids: an identity for each pair, which decides its fold together with those of its copies (`ecif.copies`); by default
            the number of its row.
        shards: name of each pair's shard, with the pairs of a shard next to each other. Batches are formed within a shard. By
            default all pairs are one shard.

    Returns:
        Columns [N] float32 by name, in the order of a run's table: `clip_score`, `held_out_cosine`, `held_out_loss`,
            `agreement`, `image_copies`, `caption_copies`, for every target the influence, `agreement_<target>` and
            `near_<target>`, `misalignment`,
            `filter_<target>`, and those of `settings.columns`.
            `ecif.columns` says what each means.

    Raises:
        ValueError: a target whose loss has no gradient in the heads, captions that are all alike, too few images that are not
            copies of each other, a shard of one pair, or an unknown column.
    """
    for side, features in (("image", images), ("text", texts)):
        if not (finite := features.isfinite().all(1)).all():
            raise ValueError(
                f"{side} features of {int((~finite).sum())} pairs are not finite, the first in row {finite.int().argmin()}"
            )
    corpus = _Corpus.of(images, texts, uids or [str(row) for row in range(len(images))], shards, settings)
    bias = settings.loss.has_bias  # a softmax is invariant to a bias of all logits; the sigmoid loss needs it fitted
    start = standardised(heads)._replace(train_logit_scale=settings.train_logit_scale, train_logit_bias=bias)
    refit = _refitter(start, corpus.sample, settings)
    cross_fit = CrossFit(settings.folds, settings.seeds, settings.checkpoints, settings.seed)
    fitted = cross_fit.gather(refit(cross_fit.jobs(corpus.sample.fold)))

    bank = sample_bank(corpus.sample, start, settings.seed)
    system = LocalSystem(fitted, Shared(corpus.sample, fitted.every(), start, settings.loss, bank), settings.how_often())
    requested = [find_kind(PairScore, name)() for name in settings.columns]  # type: ignore[type-abstract]
    scores = [ClipScore(), HeldOutCosine(), HeldOutLoss(), Agreement(), *(score for score in requested if score.evidence)]
    evidence = gather_evidence(system, scores, bank)
    refitted = _calibration(refit, len(corpus.sample.fold), settings)
    how = HowToSolve(settings.iterations, list(settings.dampings), settings.seed)
    questions = {name: deal(name, targets[name], settings.target_batch, settings.seed) for name in sorted(targets)}
    directions = {name: solve_question(system, fitted, question, refitted, how) for name, question in questions.items()}

    shards_of = corpus.pairs(start, settings, bank)

    def column_of(score: PairScore, target: TargetLoss | None = None) -> Tensor:
        images = getattr(target, "images", None)
        parts = [held_out_values(score, pairs._replace(target_images=images), fitted.ends) for pairs in shards_of]
        return corpus.in_order(torch.cat(parts))

    columns = {score.name: column_of(score) for score in scores}
    seen = torch.stack(list(columns.values()), 1)
    columns |= {column.name: getattr(corpus.copies, column.name) for column in COPIES}
    moves = [found.folds for found in directions.values()]
    influence = corpus.in_order(torch.cat([held_out_influence(pairs, fitted.folds, moves) for pairs in shards_of], 2))
    for i, name in enumerate(directions):
        columns[f"influence_positive_{name}"], columns[f"influence_negative_{name}"] = influence[0, i], influence[1, i]
        columns[f"influence_{name}"] = influence[0, i] + influence[1, i]
        columns[f"agreement_{name}"] = agreement_with_target(directions[name].bank, images, texts)[0]
        columns[f"near_{name}"] = nearness(texts, directions[name].captions, bank.text_centre)
    misalignment = evidence.misalignment(
        torch.cat([found.scores() for found in directions.values()]),
        torch.cat([found.planted_scores() for found in directions.values()]),
    )
    of_targets = [columns[f"{column}_{name}"] for name in directions for column in ("influence", "agreement")]
    columns["misalignment"] = misalignment.probability(torch.cat([seen, torch.stack(of_targets, 1)], 1)).float()
    if settings.filter:
        tried = HowToFilter(settings.filter_seeds, settings.seed)
        for name, question in questions.items():
            chosen = choose_filter(question, corpus.sample, evidence, directions[name], refit, tried)
            of_target = (columns[f"{column}_{name}"] for column in ("influence", "agreement"))
            columns[f"filter_{name}"] = chosen.scores(seen, *of_target)
    for score in (score for score in requested if not score.evidence):
        for name in questions if score.each_target else [""]:
            columns[Column.of(type(score), name).name] = column_of(score, targets.get(name))
    return columns


def _refitter(start: Heads, sample: Sample, settings: Settings) -> Refitter:
    """Runs fits, as held-out pairs choose."""
    how = HowToFit(start, settings.loss, settings.batch_size, NO_FIT)

    def fits(jobs: list[Job]) -> list[list[Heads]]:
        return run_fits(how, sample.images, sample.texts, sample.batches(), jobs)

    grid = Grid.of(settings.learning_rate, settings.epochs, settings.pull, settings.checkpoints)
    choice = choose_fit(how, sample, grid, fits, settings.seed)
    for line in choice.warnings():
        warnings.warn(line, stacklevel=3)
    return lambda jobs: fits([(choice.hyperparameters, job) for job in jobs])


def _calibration(refit: Refitter, pairs: int, settings: Settings) -> Refitted:
    """Refits without random pairs, by which the damping is chosen. There are none if there is only one damping."""
    removed = removals(pairs, settings.refits if len(settings.dampings) > 1 else 0, "calibrate", settings.seed)
    return Refitted(removed, [path[-1] for path in refit([Refit(~without, settings.seed) for without in removed])])


@dataclass(frozen=True)
class _Corpus:
    """The features of all pairs, their shards and folds, and the sample that heads are fitted on."""

    images: Tensor
    texts: Tensor
    copies: OfPairs  # the fold of every pair, and the number of its copies
    rows: dict[str, Tensor]  # rows of each shard's pairs, by the shard's name
    batches: Batching
    sample: Sample

    @classmethod
    def of(
        cls, images: Tensor, texts: Tensor, uids: Sequence[str], shards: Sequence[str] | None, settings: Settings
    ) -> "_Corpus":
        places: dict[str, list[int]] = {}
        for row, shard in enumerate(shards if shards is not None else [""] * len(images)):
            places.setdefault(shard, []).append(row)
        if alone := [shard for shard, of in places.items() if len(of) < 2]:
            raise ValueError(f"{len(alone)} shards have one pair, such as {alone[0]!r}: no other pair to contrast it with")
        rows = {shard: torch.tensor(of) for shard, of in places.items()}
        batches = Shuffled(settings.batch_size, settings.seed)
        chosen = choose_batches({shard: len(of) for shard, of in rows.items()}, batches, settings.sample)
        dealt = {shard: batches.of(shard, len(rows[shard])) for shard in chosen}
        sampled = [rows[shard][dealt[shard][i]] for shard in sorted(chosen) for i in chosen[shard]]
        every = torch.cat(sampled)
        of_sample, pair = [uids[row] for row in every.tolist()], pair_ids("", torch.arange(len(images)))
        found = find_copies(images[every], texts[every], of_sample, pair[every], settings.folds, settings.seed)
        found.check()
        sample = Sample(images[every], texts[every], found.fold, [len(batch) for batch in sampled], found.group)
        return cls(images, texts, found.of(images, texts, list(uids), pair), rows, batches, sample)

    def pairs(self, start: Heads, settings: Settings, bank: Bank) -> list[HeldOutPairs]:
        """Every shard's pairs in the batches of all repeats."""
        found = []
        for shard, rows in self.rows.items():
            batches = [b for r in range(settings.how_often()) for b in self.batches.of(shard, len(rows), r)]
            features = self.images[rows].float(), self.texts[rows].float()
            found.append(HeldOutPairs(*features, self.copies.fold[rows], batches, start, [], settings.loss, bank))
        return found

    def in_order(self, values: Tensor) -> Tensor:
        """Reorder values [..., N] from shard after shard to the order of the input rows."""
        ordered = torch.empty_like(values)
        ordered[..., torch.cat(list(self.rows.values()))] = values
        return ordered
