"""How fast this machine does what the stages after `embed` do: their own functions, timed for a moment.

Features are random and heads are the model's own, because times do not depend on values. So nothing of the corpus is read, and
heads and directions need not exist. Reading and writing tables is timed in memory: what a store takes longer is not in it.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecif.columns.agreement import agreement_with_target
from ecif.columns.bank import Bank
from ecif.columns.contract import HeldOutPairs, held_out_values
from ecif.columns.influence import held_out_influence
from ecif.columns.near import nearness
from ecif.copies import CHUNK, KNOWN, Copies, directions
from ecif.directions import BANK as TARGET_BANK
from ecif.heads import Heads, embed
from ecif.heads.cross_fit import TOGETHER, FittedHeads
from ecif.heads.fit import Course, fit, fixed_batches
from ecif.projected.curvature import DampedCurvature, gauss_newton
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import Projection, capped_ranks, random_projection
from ecif.projected.relative import gram
from ecif.sample import Sample
from ecif.slices import LinearSystem, Shared
from ecif.system import BANK, LocalSystem
from pipeline import storage
from pipeline.corpus.pairs import Pair
from pipeline.operate.sizes import Sizes
from pipeline.run_folder import tables
from pipeline.run_folder.columns import columns, evidence_scores, requested_columns
from pipeline.stages.losses import loss_of
from pipeline.stages.solve.second_order import Corrector, Curvature, SecondOrder
from pipeline.workers.cluster import device

ENOUGH_S, MOST_CALLS = 0.2, 5  # a function is called until it has taken so long, or so often
PAIRS = {"cpu": 1, "cuda": 8192}  # at least so many pairs at once: what fills the device
ROWS = 2048  # of a table that is written and read


class Rates(NamedTuple):
    """Seconds of one GPU or, where there is none, of one core."""

    score: float  # a pair: all tables of stage `score`
    fit: float  # a pair of the sample and epoch of the fits that are computed together (`TOGETHER`)
    product: float  # a pair of the sample and vector: a Gauss-Newton product
    order_two: float  # a pair of the sample and set of heads: its part of the projected curvature; 0 without order 2
    gradients: float  # a pair: its projected gradients, and its part of the curvature; 0 without an index
    self_influence: float  # a pair; 0 without an index
    write: float  # a pair, of a core: its row of a table with all columns is written
    read: float  # a pair, of a core: that row is read


def rates_of(corpus: Sizes, heads: Heads, targets: dict[str, int]) -> Rates:
    """Time every function for a moment, on the GPU if there is one.

    Args:
        corpus: the corpus, and the configuration.
        heads: of the model.
        targets: pairs of each target.
    """
    to, config = device(), corpus.config
    bench = Bench(corpus, heads.to(to), targets, to)
    order_two, index, write = config.score.order == 2, config.index, bench.write_table()
    return Rates(
        score=bench.score() + bench.read_features() + write,
        fit=bench.fit(),
        product=bench.product(),
        order_two=bench.projected(bench.projection(config.score.order_rank)) if order_two else 0.0,
        gradients=bench.gradients(bench.projection(index.rank)) if index else 0.0,
        self_influence=bench.self_influence(bench.projection(index.rank).size) if index else 0.0,
        write=write,
        read=bench.read_table(),
    )


class Bench:
    """Random pairs in the batches and shapes of a run, on a device. Arguments are those of `rates_of`."""

    def __init__(self, corpus: Sizes, heads: Heads, targets: dict[str, int], to: torch.device):
        self.config, self.heads, self.to = corpus.config, heads, to
        self.targets = {name: max(2, pairs) for name, pairs in targets.items()}
        self.loss, self.sets, self.sample = loss_of(corpus.config), corpus.fits, max(2, corpus.sample)
        self.batch = max(2, min(corpus.config.batch_size, corpus.pairs // max(1, corpus.shards)))  # of the mean shard
        self.count = self.batch * max(1, PAIRS[to.type] // self.batch)
        self.images, self.texts = self.features(self.count)
        self.batches = list(torch.arange(self.count, device=to).split(self.batch))

    def features(self, count: int) -> tuple[Tensor, Tensor]:
        """Random unit features of so many images [N, d_x] and texts [N, d_t]."""
        sides = (head.shape[0] for head in (self.heads.image, self.heads.text))
        images, texts = (normalize(torch.randn(count, d, device=self.to), dim=1) for d in sides)
        return images, texts

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of a call: the shortest of a few."""

        def once() -> float:
            started = time.perf_counter()
            work()
            if self.to.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        took = list[float]()
        if self.to.type == "cuda":
            once()  # loads kernels
        while not took or (sum(took) < ENOUGH_S and len(took) < MOST_CALLS):
            took.append(once())
        return min(took)

    def bank(self, count: int) -> Bank:
        """A bank of so many pairs, in folds from 1 on."""
        images, texts = self.features(count)
        fold = 1 + torch.arange(count, device=self.to) % self.config.fit.folds
        sharpness = torch.full((2,), 10.0, dtype=torch.float64, device=self.to)
        return Bank(images.half(), texts.half(), images.mean(0), texts.mean(0), fold, fold.float(), sharpness)

    def score(self) -> float:
        """Seconds a pair that `ScoreShard` computes. What it does for every set of heads is done for one, and multiplied."""
        score, folds = self.config.score, self.config.fit.folds
        nowhere = torch.zeros(self.count, dtype=torch.int16, device=self.to)
        batches = self.batches * self.config.repeats
        bank = self.bank(min(BANK, self.sample))
        pairs = HeldOutPairs(self.images, self.texts, nowhere, batches, self.heads, [], self.loss, bank)
        moves = [torch.randn(1, 1, self.heads.size, device=self.to) for _ in self.targets]
        total = self.sets * self.seconds(lambda: held_out_influence(pairs, [[self.heads]], moves))
        ends = [[self.heads] * self.config.fit.seeds]
        asked = [(kind, "") for kind in evidence_scores(self.config)]
        asked += [(column.score, column.target) for column in requested_columns(self.config)]
        for kind, target in asked:
            of = pairs._replace(target_images=self.features(self.targets[target])[0] if target else None)
            total += (folds if kind.of_fold else 1) * self.seconds(partial(held_out_values, kind(), of, ends))
        for count in self.targets.values():
            asked_of, captions = self.bank(min(TARGET_BANK, count)), self.features(count)[1].half()
            total += self.seconds(partial(agreement_with_target, asked_of, self.images, self.texts))
            total += self.seconds(partial(nearness, self.texts, captions, bank.text_centre))
        if score.order == 2:
            total += self.sets * self._correction(batches)
        return total / self.count + self.copies()

    def copies(self) -> float:
        """Seconds a pair to look for copies of it in the sample."""
        known, count = min(KNOWN, self.sample), max(CHUNK, self.count)
        images, texts = self.features(known)
        centres = [side.double().mean(0) for side in (images, texts)]
        units = [directions(side, centre) for side, centre in zip((images, texts), centres, strict=True)]
        rows = torch.arange(known, device=self.to)
        of_sample = Copies(units[0], units[1], centres[0], centres[1], rows, rows, rows.short(), self.config.fit.folds, 0)
        asked, pair = self.features(count), torch.arange(count, device=self.to) + known
        uids = [f"{n:032x}" for n in range(count)]
        return self.seconds(lambda: of_sample.of(*asked, uids, pair)) / count * self.sample / known

    def _correction(self, batches: list[Tensor]) -> float:
        """Seconds of the second-order correction of all pairs under one set of heads."""
        projection = self.projection(self.config.score.order_rank)
        k, mine = projection.size, torch.arange(self.count, device=self.to) % self.config.fit.folds == 0
        curvature = Curvature(projection, torch.eye(k, dtype=torch.float64).expand(1, 1, k, k))
        target = SecondOrder(torch.randn(1, 1, k), torch.eye(k).expand(1, 1, k, k), torch.ones(1, 1, dtype=torch.float64))
        correct = Corrector(curvature, [target] * len(self.targets), self.config.score.negative, self.to)
        pairs = embed(self.heads, self.images, self.texts)
        return self.seconds(lambda: correct(0, 0, self.heads, pairs, batches, mine))

    def fit(self) -> float:
        """Seconds a pair and epoch of `TOGETHER` fits."""
        courses = [Course(fixed_batches(self.batches), seed) for seed in range(TOGETHER[self.to.type])]

        def work(courses: list[Course]) -> None:
            how: dict[str, Any] = {"batch_size": self.batch, "epochs": 1, "learning_rate": 1e-4, "loss": self.loss}
            fit(self.heads, self.images, self.texts, courses, **how)

        work([Course(fixed_batches([torch.arange(2, device=self.to)]), 0)])  # imports what torch's optimisers need
        return self.seconds(lambda: work(courses)) / self.count

    def product(self) -> float:
        """Seconds a pair and vector of a Gauss-Newton product, of as many sets of heads as are computed together."""
        some = min(TOGETHER[self.to.type], self.sets)
        fold = (torch.arange(self.count) % self.config.fit.folds).short()
        sample = Sample(self.images.half().cpu(), self.texts.half().cpu(), fold, [len(rows) for rows in self.batches])
        fitted = FittedHeads([self.heads], [[self.heads]] * some)
        system = LocalSystem(fitted, Shared(sample, fitted.every(), self.heads, self.loss, self.bank(2)), 1)
        systems = [LinearSystem(1 + i, -1) for i in range(some)]
        vectors = torch.randn(some, self.heads.size, device=self.to)
        system.product(systems, vectors)  # prepares what later products use again
        return self.seconds(lambda: system.product(systems, vectors)) / some / self.count

    def projection(self, rank: tuple[int, int]) -> Projection:
        """A random projection of the heads' gradients."""
        return random_projection(self.heads, *capped_ranks(self.heads, rank), 0).to(self.images)

    def projected(self, projection: Projection) -> float:
        """Seconds a pair of the projected curvature, under one set of heads."""
        pairs = embed(self.heads, *(side[self.batches[0]] for side in (self.images, self.texts)))
        return self.seconds(lambda: gauss_newton(project_batch(self.heads, pairs, projection))) / self.batch

    def gradients(self, projection: Projection) -> float:
        """Seconds a pair of its projected gradients, and of its part of the curvature."""
        pairs = embed(self.heads, *(side[self.batches[0]] for side in (self.images, self.texts)))
        rows = np.arange(self.batch)

        def work() -> None:
            batch = project_batch(self.heads, pairs, projection)
            for part in pair_gradients(batch, self.config.score.negative):
                tables.HalfPrecision.empty(len(rows), projection.size).put(rows, part.cpu().numpy())
            gauss_newton(batch)

        return self.seconds(work) / len(rows)

    def self_influence(self, size: int) -> float:
        """Seconds a pair to solve with a projected curvature [size, size]."""
        curvature = DampedCurvature(torch.eye(size, dtype=torch.float64, device=self.to))
        part = torch.randn(self.batch, size, device=self.to)

        def work() -> None:
            gram(curvature.solve(part), curvature.solve(part))
            curvature.self_influence(part)

        return self.seconds(work) / len(part)

    def read_features(self) -> float:
        """Seconds a pair to read features."""
        images, texts = (side.half().cpu().numpy() for side in self.features(ROWS))
        features = tables.parquet_bytes(tables.features_table(_pairs(), images, texts))
        return self.seconds(lambda: tables.as_features(storage.parse_table(features))) / ROWS

    def write_table(self) -> float:
        """Seconds a pair to write a table of all columns."""
        return self.seconds(self._table) / ROWS

    def read_table(self) -> float:
        """Seconds a pair to read such a table."""
        table = self._table()
        return self.seconds(lambda: storage.parse_table(table)) / ROWS

    def _table(self) -> bytes:
        """A table of ROWS pairs with all columns of a run."""
        batch = np.zeros(ROWS, np.int32)
        nothing = np.empty((ROWS, 0), np.float16)
        keys, uids, hashes = _texts()
        features = tables.Features(batch, keys, uids, hashes, nothing, nothing)
        values = np.random.default_rng(0).standard_normal((len(columns(self.config)), ROWS)).astype(np.float32)
        scores = dict(zip((column.name for column in columns(self.config)), values, strict=True))
        return tables.parquet_bytes(
            tables.scores_table(tables.identity("00000", features, batch, batch.astype(np.int16)), scores)
        )


def _texts() -> list[list[str]]:
    """Keys, uids and hashes of images of ROWS pairs."""
    random = np.random.default_rng(0)
    return [[f"{n:09d}" for n in range(ROWS)], *([random.bytes(16).hex() for _ in range(ROWS)] for _ in range(2))]


def _pairs() -> list[Pair]:
    """ROWS pairs without pixels."""
    keys, uids, hashes = _texts()
    return [Pair(i, keys[i], uids[i], "", np.empty(0, np.uint8), hashes[i]) for i in range(ROWS)]
