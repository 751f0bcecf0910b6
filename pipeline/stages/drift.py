"""Stage `drift` of a night: how its pairs differ from the sample that was learned from, and whether that still predicts.

A night is judged by some of its shards, evenly chosen, because the driver reads their features.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecif.columns.evidence import Evidence
from ecif.columns.misalignment import Misalignment
from ecif.columns.near import asked_share
from ecif.directions import Directions
from ecif.drift import Measure, difference, telling
from ecif.evaluation import linear_datamodeling_score
from ecif.fit_choice import FitChoice
from ecif.heads import Heads
from ecif.heads.cross_fit import Refit, removals
from ecif.sample import Sample
from pipeline import storage
from pipeline.run_folder import tables, tensors
from pipeline.run_folder.columns import evidence_scores
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Drift
from pipeline.stages.fit.stage import how_to_fit, refitter
from pipeline.stages.solve.targets import read_target
from pipeline.workers.progress import Stage
from pipeline.workers.run import Run

SHARDS = 8  # whose features are read
PAIRS = 4096  # that are compared
COLUMNS = ("fold", "held_out_loss", "misalignment")


class _Pairs(NamedTuple):
    """Some pairs of a night, in the order of their shards."""

    images: Tensor  # [N, d_x] float16
    texts: Tensor  # [N, d_t]
    columns: dict[str, Tensor]  # [N] each

    def some(self, most: int) -> "_Pairs":
        """Evenly chosen pairs of these."""
        rows = torch.arange(min(most, len(self.images))) * len(self.images) // min(most, len(self.images))
        return _Pairs(self.images[rows], self.texts[rows], {name: column[rows] for name, column in self.columns.items()})


class Drifted(NamedTuple):
    """How the pairs of a night differ from the sample, and from what was unusable then."""

    misaligned: float | None = None  # mean probability of misalignment of the pairs; None if none was usable
    measures: dict[str, Measure] = {}
    lds: dict[str, float] = {}  # by target, agreement of the pairs' influence with refits without some of them

    def facts(self) -> dict[str, Any]:
        """In plain values."""
        measures = {name: [round(value, 4) for value in one] for name, one in self.measures.items()}
        return {"misaligned": self.misaligned, "measures": measures, "lds": self.lds}

    def beyond(self, bounds: Drift) -> list[str]:
        """The measures that are beyond their bounds, as text."""
        found = []
        for name, measure in self.measures.items():
            bound = getattr(bounds, _bound_of(name))
            if bound is not None and measure.is_beyond(bound):
                found.append(f"{name} {measure.value:.3g} is beyond {_bound_of(name)}: {bound:g}")
        return found


def measure_drift(run: Run, start: Heads, corpus: Dataset, targets: dict[str, Dataset], published: dict[str, str]) -> Drifted:
    """Compare the pairs of a night with the sample of the run's reference.

    Args:
        run: the run; its artifacts are those of the reference.
        start: the model's own heads.
        corpus: features of the night's shards.
        targets: features of the targets.
        published: URL of the columns of each shard.
    """
    config, artifacts = run.config, run.artifacts
    evidence = tensors.load(artifacts.url("evidence"), Evidence)
    found = {name: tensors.load(artifacts.url(f"directions/{name}"), Directions) for name in config.targets}
    pairs = _read(corpus, published, [f"influence_{name}" for name in config.targets])
    some, bank = pairs.some(PAIRS), evidence.bank
    images = normalize(some.images.float() - bank.image_centre, dim=1)
    texts = normalize(some.texts.float() - bank.text_centre, dim=1)
    fold = some.columns["fold"]
    real = torch.cat([directions.scores() for directions in found.values()])
    model = tensors.load(artifacts.url("misalignment"), Misalignment)
    loss = evidence.real[[score.name for score in evidence_scores(config)].index("held_out_loss")]
    measures = {
        "images": telling(bank.images, bank.fold, images, fold),
        "texts": telling(bank.texts, bank.fold, texts, fold),
        "held_out_loss": difference(loss, pairs.columns["held_out_loss"]),
        "misaligned": difference(model.probability(evidence.of(real)), pairs.columns["misalignment"]),
    }
    for name, directions in found.items():
        asked, centre = normalize(directions.captions.float() - bank.text_centre, dim=1), torch.zeros(texts.shape[1])
        then, now = (_share(asked_share(of.float(), asked, centre, bank.texts), len(of)) for of in (bank.texts, texts))
        measures[f"coverage_{name}"] = Measure(then.value - now.value, (then.error**2 + now.error**2) ** 0.5)
    return Drifted(pairs.columns["misalignment"].mean().item(), measures, _agreement(run, start, targets, some))


def unusable(done: dict[str, Accounting], then: float) -> Measure:
    """By how much the share of a night's pairs that are unusable differs from an earlier one."""
    pairs = sum(a.pairs for a in done.values())
    share = _share(1 - sum(a.embedded for a in done.values()) / max(1, pairs), pairs)
    return share._replace(value=share.value - then)


def _agreement(run: Run, start: Heads, targets: dict[str, Dataset], pairs: _Pairs) -> dict[str, float]:
    """LDS of the influence of a night's pairs: heads are fitted on them, and on random parts of them."""
    choice = tensors.load(run.artifacts.url("fit_choice"), FitChoice)
    how, count = how_to_fit(run.config, start, choice.hyperparameters), len(pairs.images)
    refits = run.config.solve.calibration_refits
    if not refits or count < 2 * run.config.batch_size:
        return {}
    sizes = [len(rows) for rows in torch.arange(count).tensor_split(count // run.config.batch_size)]
    sample = Sample(pairs.images, pairs.texts, torch.zeros(count, dtype=torch.int16), sizes)
    removed = removals(count, refits, "drift", run.config.seed)
    with Stage("drift", refits) as progress:
        refit = refitter(run.resources, how, sample, progress)
        heads = [path[-1] for path in refit([Refit(~without, run.config.seed) for without in removed])]
    found = {}
    for name, dataset in targets.items():
        question = read_target(name, dataset).question(run.config)
        losses = torch.stack([question.group_losses(one).mean()[None] for one in heads])
        found[name] = linear_datamodeling_score(pairs.columns[f"influence_{name}"][None], removed, losses)
    return {name: round(lds, 3) for name, lds in found.items() if lds == lds}


def _read(corpus: Dataset, published: dict[str, str], more: list[str]) -> _Pairs:
    done = {shard: a for shard, a in corpus.accounting().items() if a.embedded}
    chosen = [list(done)[i * len(done) // min(SHARDS, len(done))] for i in range(min(SHARDS, len(done)))]

    def read(shard: str) -> tuple[tables.Features, pa.Table]:
        columns = storage.parse_table(storage.read_bytes(published[shard]), [*COLUMNS, *more])
        return tables.read_features(corpus.features_folder(shard), done[shard].parts), columns

    each = list(storage.in_threads(read, chosen))
    columns = pa.concat_tables(table for _, table in each)
    images = torch.from_numpy(np.concatenate([features.images for features, _ in each]))
    texts = torch.from_numpy(np.concatenate([features.texts for features, _ in each]))
    return _Pairs(images, texts, {name: torch.tensor(columns[name].to_numpy()) for name in columns.column_names})


def _share(share: float, count: int) -> Measure:
    """A share of so many, with the error of a binomial's."""
    return Measure(share, (max(share * (1 - share), 1 / max(1, count)) / max(1, count)) ** 0.5)


def _bound_of(name: str) -> str:
    """The key of `nightly.drift` that bounds a measure."""
    return "features" if name in ("images", "texts") else name.partition("_")[0] if name.startswith("coverage_") else name
