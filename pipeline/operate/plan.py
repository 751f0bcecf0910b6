"""Estimate what a run would do, store and cost.

Sources are listings, `_stats.json` or the first bytes of a few shards, and what this machine does in a few seconds.
"""

import io
from typing import NamedTuple

from pipeline import storage
from pipeline.config import Config
from pipeline.console import say
from pipeline.corpus import sidecar
from pipeline.corpus.captions import find_pairs
from pipeline.corpus.glance import glance
from pipeline.corpus.remarks import of_layout
from pipeline.corpus.shards import Shard
from pipeline.corpus.tar import Contents, read_groups
from pipeline.inputs import load_inputs
from pipeline.operate.bill import size
from pipeline.operate.costs import Cost, Costs, Machine
from pipeline.operate.pace import HEAD, measure
from pipeline.operate.rates import rates_of
from pipeline.operate.sizes import Sizes, of_features
from pipeline.run_folder.dataset import Dataset
from pipeline.sections import Embed, Reading
from pipeline.stages.forward.model import check_parameters
from pipeline.workers.cluster import device
from pipeline.workers.process import as_found

SAMPLED = 8  # shards that pairs a byte are estimated from


class DatasetPlan(NamedTuple):
    """A corpus or a target."""

    name: str
    shards: int
    bytes: int
    pairs: int  # estimated
    done_shards: int
    done_bytes: int
    done_pairs: int
    feature_bytes: int  # estimated, of all shards

    def cells(self) -> list[str]:
        """Cells of a table row, in the columns of `HEADER`."""
        counts = [str(self.shards), size(self.bytes), f"~{self.pairs}", str(self.done_shards)]
        left = [str(self.shards - self.done_shards), size(self.bytes - self.done_bytes)]
        return [self.name, *counts, *left, f"~{size(self.feature_bytes)}"]


HEADER = ["", "shards", "size", "pairs", "shards done", "left", "size left", "features"]


class RunPlan(NamedTuple):
    """The estimate for a configuration."""

    datasets: list[DatasetPlan]
    notes: list[str]  # what a user has to know about the shards and uids of the corpus, a line each
    pace: str | None  # how fast this machine reads and embeds; None if no pair could be read
    machine: Machine  # what the costs are for
    costs: list[Cost]  # of each stage
    night: Cost | None  # of some new shards, once there is a generation; None where nights can't be


@as_found()
def plan(config: Config) -> RunPlan:
    """Estimate a run; nothing is started or written.

    Raises:
        UserError: the corpus, the model or a target can't be read.
    """
    inputs = load_inputs(config)
    heads = inputs.model.heads
    parameters = heads.image.numel() + heads.text.numel()
    shape = Sizes(config, 0, 0, 0, heads.image.shape[0] + heads.text.shape[0], parameters, check_parameters(config))
    datasets = [_dataset(name, dataset, shape, config.embed) for name, dataset in inputs.datasets().items()]
    seen = glance(inputs.corpus.shards, inputs.corpus.reading.key, inputs.corpus.sidecars, config.embed)
    impossible = [f"{seen.impossible}; `ecif run` refuses them"] if seen.impossible else []
    pace = measure(inputs.model, inputs.corpus, config.embed)
    whole, *targets = (shape._replace(shards=one.shards, pairs=one.pairs, bytes=one.bytes) for one in datasets)
    machine = Machine.like_this(config, device().type)
    rates = rates_of(whole, heads, dict(zip(config.targets, (target.pairs for target in targets), strict=True)))
    costs = Costs(whole, sum(target.parts for target in targets), pace, rates, machine)
    left = shape._replace(
        shards=sum(one.shards - one.done_shards for one in datasets),
        pairs=sum(one.pairs - one.done_pairs for one in datasets),
        bytes=sum(one.bytes - one.done_bytes for one in datasets),
    )
    notes = [*impossible, *seen.said(config.batch_size)]
    return RunPlan(datasets, notes, pace.said() if pace else None, machine, costs.of_run(left), costs.of_night())


def _dataset(name: str, dataset: Dataset, shape: Sizes, limits: Embed) -> DatasetPlan:
    done = dataset.accounting()
    left = [shard for shard in dataset.shards if shard.name not in done]
    sample = [left[i * len(left) // SAMPLED] for i in range(SAMPLED)] if len(left) > SAMPLED else left
    counted = list(storage.in_threads(lambda shard: count_pairs(shard, dataset.reading, limits), sample))
    for shard, found in zip(sample, counted, strict=True):
        for remark in found.remarks:
            say(f"{shard.source.url}: {remark}")
    bytes_left = sum(shard.source.size for shard in left)
    pairs_a_byte = sum(found.pairs for found in counted) / max(1, sum(found.bytes for found in counted))
    done_pairs = sum(a.pairs for a in done.values())
    pairs = done_pairs + round(bytes_left * pairs_a_byte)
    done_bytes = sum(a.size for a in done.values())
    whole = shape._replace(shards=len(dataset.shards), pairs=pairs, bytes=bytes_left + done_bytes)
    return DatasetPlan(name, whole.shards, whole.bytes, pairs, len(done), done_bytes, done_pairs, of_features(whole))


class Counted(NamedTuple):
    """A number of pairs of a shard, the bytes that hold them, and what is odd about the shard."""

    pairs: int
    bytes: int
    remarks: list[str] = []


def count_pairs(shard: Shard, reading: Reading, limits: Embed) -> Counted:
    """Count pairs of a shard.

    All pairs are counted if there is a `_stats.json`, else those in the first HEAD bytes.
    """
    successes, wrong = sidecar.successes(shard.source)
    if successes is not None and reading.pick != "all":  # it counts images
        return Counted(successes, shard.source.size)
    data, contents = storage.read_start(shard.source.url, HEAD), Contents()
    file = io.BytesIO(data)
    starts = [pair.start for pair in find_pairs(file, read_groups(file, contents, reading.key), reading, limits)]
    remarks = [remark for remark in (wrong, *of_layout(contents).values()) if remark]
    if len(data) < shard.source.size and len(starts) > 1:  # the last pair is cut
        return Counted(len(starts) - 1, starts[-1], remarks)
    return Counted(len(starts), len(data), remarks)
