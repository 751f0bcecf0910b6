"""The costs of known corpora in docs/cluster.md are what `ecif plan` computes from the measured rates on the same page."""

import re

from pipeline.config import Config
from pipeline.operate.bill import number, size
from pipeline.operate.costs import Costs, Machine, total
from pipeline.operate.pace import Pace
from pipeline.operate.rates import Rates
from pipeline.operate.sizes import Sizes
from tests.support.markdown import table

PAGE, TAR = "docs/cluster.md", 250_000_000
CORPORA = {"LAION-400M": (41_455, 8), "DataComp medium": (12_800, 3), "DataComp xlarge": (1_280_000, 256)}


def measured(what: str) -> list[float]:
    """The numbers in a row of the measured rates."""
    (cell,) = (rate for name, rate, *_ in table(PAGE, "", "pairs/s", "busy").rows if name.startswith(what))
    return [float(found) for found in re.findall(r"[\d.]+", cell.replace(",", ""))]


def column(shards: int, new: int) -> list[str]:
    base = {"run": "r", "corpus": {"shards": "x"}, "model": {"name": "ViT-B-32"}, "targets": {"t": {"shards": "y"}}}
    config = Config.model_validate(base)
    (embed, _), (passes, _) = measured("one actor of `embed`"), measured("`score`, batches of 256")
    (agreement,), (_, fits) = measured("`agreement`"), measured("an epoch of a fit over 65,536 pairs")
    score = config.fit.folds * config.fit.fits / passes + 1 / agreement
    rates = Rates(score, fits / 65_536, 0, 0, 0, 0, 0, 0)
    whole = Sizes(config, shards, 10_000 * shards, TAR * shards, 768 + 512, 512 * (768 + 512), 0)
    costs = Costs(whole, 0, Pace("cuda", float("inf"), embed), rates, Machine("cuda", 1, 1))
    run, night = costs.of_run(whole), costs.of_night(new)
    assert sum(cost.most for cost in run if cost.stage in ("fit", "filter")) < 30
    hours = sum(cost.most for cost in run if cost.stage in ("embed", "score")) / 3600
    everything = total("", run)
    cells = [f"{whole.pairs:,}", f"{shards:,}", number(hours), size(everything.stored)]
    cells += [number(everything.writes), number(everything.reads), str(new), number(night.most), size(night.stored)]
    return [*cells, number(night.writes), number(night.reads)]


def test_costs_of_known_corpora():
    found = table(PAGE, "", *CORPORA)
    columns = [column(*of) for of in CORPORA.values()]
    assert [row[1:] for row in found.rows] == [list(row) for row in zip(*columns, strict=True)]
