"""What the stages of a run cost: time, requests and bytes, from the rates of this machine.

Requests are those of an S3 store through `s3fs`, counted from what the stages do for each shard, part and table. A listing is a
request for each PAGE objects, and is billed as a write. The lease, which is written and listed every 5 s of a run, is left out.
"""

import math
import os
from typing import NamedTuple

import torch

from ecif.fit_choice import ENOUGH, Grid
from ecif.heads.cross_fit import TOGETHER
from ecif.slices import MAX_SLICES
from ecif.targets.question import CALIBRATION_GROUPS, PARTS
from pipeline.config import Config
from pipeline.operate.pace import Pace
from pipeline.operate.rates import Rates
from pipeline.operate.sizes import BYTES, Sizes, of_features, of_kind, of_stages
from pipeline.run_folder.artifacts import KINDS, each_shard, keys_of, stages_of
from pipeline.stages.drift import SHARDS
from pipeline.stages.embed.finish import FEW

PAGE = 1000  # objects in an answer to a listing
BLOCK = 50 << 20  # bytes of one GET; a larger object takes one for each, and one more
NIGHT = 10  # new shards
OF_OBJECT = (2, 3)  # writes and reads of an object that is made once and read by the driver and a worker
FORWARD = {"score": (1.1, 4.0), "product": (3.0, 8.0)}  # forward passes, see "Forward mode" in docs/method.md
FIRST_PRODUCTS = 8  # of forward mode's solve, which find the largest eigenvalue


class Machine(NamedTuple):
    """What the work is planned for: workers like those of this machine."""

    device: str  # "cpu" or "cuda"
    workers: int  # GPUs, or cores where there are none
    cores: int  # that each worker has

    @classmethod
    def like_this(cls, config: Config, device: str) -> "Machine":
        """The workers that the configuration asks for, by default those of this machine."""
        cores = os.cpu_count() or 1
        if device == "cpu":
            return cls(device, config.workers or cores, 1)
        gpus = max(1, torch.cuda.device_count())
        return cls(device, config.workers or gpus, max(1, cores // gpus))


class Cost(NamedTuple):
    """What a stage costs. Times are a range, from `least` to `most`, and NaN where nothing is known."""

    stage: str
    least: float = 0.0  # seconds on all workers
    most: float = 0.0
    stored: float = 0.0  # bytes
    writes: float = 0.0  # requests
    reads: float = 0.0


def total(name: str, costs: list[Cost]) -> Cost:
    """The sum, under a name."""
    return Cost(name, *(sum(column) for column in list(zip(*costs, strict=True))[1:]))


class Costs:
    """The costs of a run's stages.

    Args:
        whole: the corpus.
        of_targets: parts of all targets.
        pace: how fast this machine reads and embeds; None if that is not known.
        rates: how fast it does the rest.
        machine: what the work is planned for.
    """

    def __init__(self, whole: Sizes, of_targets: int, pace: Pace | None, rates: Rates, machine: Machine):
        self.whole, self.of_targets, self.config = whole, of_targets, whole.config
        self.pace, self.rates, self.machine = pace, rates, machine
        fit = self.config.fit
        grid = Grid.of(fit.learning_rate, fit.epochs, fit.pull, fit.checkpoints)
        self.grid, self.epochs = grid, (min(grid.epochs) if grid.fixed else 0, max(grid.epochs))  # heads may stay as they are

    def of_run(self, left: Sizes) -> list[Cost]:
        """Every stage of a run, in order.

        Args:
            left: what is still to be embedded. Every other stage counts as not begun.
        """
        stored, objects = of_stages(self.whole), self._objects()
        publish = total("publish", [self._publish(self.whole), self._uids()])
        costs = [self._embed(left), *(self._stage(name, self.whole) for name in objects), publish]
        pages = self._pages()
        return [
            cost._replace(
                stored=stored.get(cost.stage, cost.stored),
                writes=cost.writes + OF_OBJECT[0] * objects.get(cost.stage, 0) + pages * self._listings(cost.stage),
                reads=cost.reads + OF_OBJECT[1] * objects.get(cost.stage, 0),
            )
            for cost in costs
        ]

    def of_night(self, shards: int = NIGHT) -> Cost | None:
        """New shards of the mean size, beside all others, with what was learned before. None where nights can't be."""
        if self.config.index or self.config.scoring.mode == "forward":
            return None
        pairs, size = (round(shards * count / self.whole.shards) for count in (self.whole.pairs, self.whole.bytes))
        new = self.whole._replace(shards=shards, pairs=pairs, bytes=size)
        costs = [self._embed(new), self._stage("score", new), self._publish(new)]
        kinds = [kind for kind in KINDS if kind in BYTES and KINDS[kind].asked(self.config) and "shard" in KINDS[kind].each]
        stored = of_features(new) + sum(of_kind(kind, new) for kind in kinds)
        looked_at = shards * (2 + len(keys_of("score", self.config)) + 2)  # what exists of each new shard, by name
        drift = min(shards, SHARDS) * (new.parts / max(1, new.shards) + 1)
        night = total(f"a night of {shards} new shards", costs)
        return night._replace(stored=stored, writes=night.writes + self._pages(), reads=night.reads + looked_at + drift)

    def _objects(self) -> dict[str, int]:
        """By stage between `embed` and `publish`, in order, how many objects it makes that are of no shard."""
        return {stage: sum(not each_shard(key) for key in keys) for stage, keys in stages_of(self.config).items()}

    def _stage(self, name: str, new: Sizes) -> Cost:
        stages = {"fit": self._fit, "solve": self._solve, "order 2": self._order_two, "filter": self._filter}
        forward = {"fit": self._forward_fit, "solve": self._forward_solve, "score": self._forward_score}
        stages |= {f"forward {stage}": cost for stage, cost in forward.items()}
        return (stages | {"score": self._score, "index": self._index})[name](new)

    def _embed(self, new: Sizes) -> Cost:
        seconds = math.nan if new.pairs else 0.0
        if self.pace and new.pairs:
            read, model = 1 / self.pace.reading, 1 / self.pace.model
            each = read + model if self.machine.device == "cpu" else max(model, read / self.machine.cores)
            one_shard = new.pairs / new.shards * read  # by one reader, whatever the number of workers
            seconds = max(new.pairs * each / self.machine.workers, one_shard)
        many = new.shards > FEW  # are finished by other processes, which look at the lease first
        uids = int(self.config.corpus.uid == "sidecar")
        reads = _fetches(new) + new.shards * (5 + uids + many)  # 2 HEAD of the tar, its `_stats.json`, its quarantine
        writes = new.parts + new.shards * (3 + many)  # its quarantine and its parts are listed
        return Cost("embed", seconds, seconds, of_features(new), writes, reads)

    def _fit(self, new: Sizes) -> Cost:
        folds, sample = self.config.fit.folds, self.whole.sample
        held_out = min(folds, -(-ENOUGH * folds // sample))
        pulls = self._fits(len(self.grid.pulls) * held_out, sum(self.grid.epochs)) * len(self.grid.learning_rates)
        least, most = (pulls + self._fits(1 + folds * self.config.fit.seeds, epochs) for epochs in self.epochs)
        shards = min(self.whole.shards, -(-sample // self.config.batch_size))
        return Cost("fit", least, most, reads=shards * self.whole.parts / self.whole.shards)

    def _solve(self, new: Sizes) -> Cost:
        fit, solve, targets = self.config.fit, self.config.solve, len(self.config.targets)
        vectors = targets * (PARTS * self.whole.fits + fit.checkpoints * CALIBRATION_GROUPS)
        products = solve.iterations * vectors * self.whole.sample * self.rates.product
        scored = 2 * self.whole.sample * self.rates.score  # with their own and with planted captions
        work = (products + scored) / min(self.machine.workers, MAX_SLICES)
        least, most = (work + self._fits(solve.calibration_refits, epochs) for epochs in self.epochs)
        return Cost("solve", least, most, reads=self.of_targets)

    def _order_two(self, new: Sizes) -> Cost:
        work = self.whole.sample * self.whole.fits * self.rates.order_two / self.machine.workers
        return Cost("order 2", work, work)

    def _filter(self, new: Sizes) -> Cost:
        seeds = self.config.filter.seeds if self.config.filter else 0
        most = len(self.config.targets) * self._fits(seeds * (1 + PARTS), self.epochs[1])
        return Cost("filter", 0.0, most)  # where no share of misaligned pairs is known, nothing is refitted

    def _score(self, new: Sizes) -> Cost:
        seconds = new.pairs * self.rates.score / min(self.machine.workers, new.shards)
        tables = len(keys_of("score", self.config))
        return Cost("score", seconds, seconds, writes=tables * new.shards, reads=new.parts)

    def _forward_fit(self, new: Sizes) -> Cost:
        scoring = self.config.scoring
        least, most = self._passes(scoring.sample * scoring.epochs, 1, (3.0, 3.0))  # forward and backward
        return Cost("forward fit", least, most, reads=self._pixels())

    def _forward_solve(self, new: Sizes) -> Cost:
        scoring = self.config.scoring
        pairs = scoring.sample * len(self.config.targets)
        least, most = self._passes(pairs, min(self.machine.workers, MAX_SLICES), FORWARD["product"])
        products = FIRST_PRODUCTS + scoring.iterations  # at most
        return Cost("forward solve", (FIRST_PRODUCTS + 1) * least, products * most, reads=self._pixels())

    def _forward_score(self, new: Sizes) -> Cost:
        targets = len(self.config.targets)
        least, most = self._passes(new.pairs * targets, min(self.machine.workers, new.shards), FORWARD["score"])
        reads = _fetches(new) + 2 * new.shards
        return Cost("forward score", least, most, writes=targets * new.shards, reads=reads)

    def _index(self, new: Sizes) -> Cost:
        seconds = new.pairs * self.rates.gradients / min(self.machine.workers, new.shards)
        seconds += self.whole.pairs * self.rates.self_influence / min(self.machine.workers, self.whole.shards)
        reads = new.parts + 2 * self.whole.shards  # every shard's part of the curvature, and its gradients
        writes = 2 * new.shards + self.whole.shards
        return Cost("index", seconds, seconds, writes=writes, reads=reads)

    def _publish(self, new: Sizes) -> Cost:
        tables = [key for key in (*keys_of("score", self.config), *keys_of("forward score", self.config))]
        read = len(tables) + bool(self.config.corpus.sidecar)
        seconds = new.pairs * (self.rates.read + self.rates.write) / min(self.machine.workers * self.machine.cores, new.shards)
        return Cost("publish", seconds, seconds, writes=new.shards, reads=new.shards * read)

    def _uids(self) -> Cost:
        """What a run asks of the uids of all published pairs."""
        seconds = self.whole.pairs * self.rates.read / min(self.machine.workers * self.machine.cores, self.whole.shards)
        return Cost("uids", seconds, seconds, reads=self.whole.shards)

    def _listings(self, stage: str) -> int:
        """How often a stage of a run lists an object for each shard."""
        tables, targets = len(keys_of("score", self.config)), len(self.config.targets)
        return {"embed": 3, "score": tables, "forward score": targets, "index": 2, "publish": 2}.get(stage, 0)

    def _fits(self, jobs: int, epochs: int) -> float:
        """Seconds of some fits of one length on the sample."""
        groups = -(-jobs // TOGETHER[self.machine.device])
        return -(-groups // self.machine.workers) * epochs * self.whole.sample * self.rates.fit

    def _passes(self, pairs: int, workers: int, factors: tuple[float, float]) -> tuple[float, float]:
        """Seconds of so many pairs, from the forward passes that each takes, at least and at most.

        NaN on a GPU: forward mode computes in float32, and `embed` does not.
        """
        known = self.pace is not None and self.machine.device == "cpu"
        each = 1 / self.pace.model if self.pace and known else math.nan
        least, most = (pairs * factor * each / workers for factor in factors)
        return least, most

    def _pixels(self) -> float:
        """Requests that read forward mode's sample: tars, and features."""
        shards = min(self.whole.shards, -(-self.config.scoring.sample // self.config.batch_size))
        return shards * (_fetches(self.whole) + self.whole.parts) / self.whole.shards + shards

    def _pages(self) -> int:
        """Requests of a listing with an object for each shard."""
        return -(-self.whole.shards // PAGE)


def _fetches(sizes: Sizes) -> int:
    """GETs of all tars."""
    blocks = math.ceil(sizes.bytes / max(1, sizes.shards) / BLOCK)
    return sizes.shards * (1 if blocks <= 1 else 1 + blocks)
