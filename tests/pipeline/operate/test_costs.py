"""What the stages of a run would cost: held against arithmetic by hand, with rates that are given."""

import math
import time
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from ecif.heads import Heads
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.operate import rates as measured
from pipeline.operate.bill import bill, month, number, price, size
from pipeline.operate.costs import NIGHT, Cost, Costs, Machine
from pipeline.operate.pace import Pace
from pipeline.operate.plan import plan
from pipeline.operate.rates import Rates, rates_of
from pipeline.operate.sizes import BYTES, Sizes
from pipeline.run_folder.artifacts import KINDS, stages_of
from pipeline.sections import Prices
from pipeline.stages.drift import SHARDS

EMBEDDED = Path(str(files("jobs.demo") / "corpus"))
BASE = {"run": "/run", "corpus": {"shards": "/corpus"}, "model": {"name": "m"}, "targets": {"clean": {"shards": "/clean"}}}
FORWARD = {"scoring": {"mode": "forward", "parameters": ["*"], "sample": 1000, "iterations": 10}}
CORE, RATES = Pace("cpu", 200.0, 50.0), Rates(0.01, 1e-3, 1e-4, 1e-3, 2e-3, 1e-3, 1e-4, 5e-5)
PRICES = Prices(gpu_hour=2.5, core_hour=0.1, tb_month=20.0, thousand_writes=0.005, thousand_reads=0.0004)


def corpus(shards: int = 100, size: int = 20_000_000, **more) -> Sizes:
    """Shards of 1000 pairs each."""
    return Sizes(Config.model_validate(BASE | more), shards, 1000 * shards, shards * size, 1280, 655_360, 1000)


def costs(whole: Sizes, machine: Machine | None = None, pace: Pace | None = CORE) -> Costs:
    return Costs(whole, 2, pace, RATES, machine or Machine("cpu", 4, 1))


def by_stage(found: list[Cost]) -> dict[str, Cost]:
    return {cost.stage: cost for cost in found}


def test_everything_that_stages_after_embed_store_is_counted():
    assert BYTES.keys() == {kind for kind, what in KINDS.items() if what.stage != "embed"}


@pytest.mark.parametrize("more", [{}, {"filter": None}, {"index": {}}, {"score": {"order": 2}}, FORWARD])
def test_every_stage_that_is_asked_for_costs_something_and_no_other(more):
    whole = corpus(**more)
    found = by_stage(costs(whole).of_run(whole))
    assert list(found) == ["embed", *stages_of(whole.config), "publish"]
    for cost in found.values():
        assert min(cost.stored, cost.writes, cost.reads, cost.most) > 0
        assert cost.least <= cost.most
    twice = corpus(**more, targets={name: {"shards": "/clean"} for name in "ab"})
    grown = by_stage(costs(twice).of_run(twice))
    assert all(grown[stage].stored >= cost.stored for stage, cost in found.items())
    assert grown["solve"].stored > found["solve"].stored, "a second target has directions of its own"
    assert grown["score"].writes > found["score"].writes


def test_a_core_reads_and_embeds_and_a_gpu_waits_for_its_readers():
    whole = corpus()
    assert by_stage(costs(whole).of_run(whole))["embed"].most == pytest.approx(100_000 * (1 / 200 + 1 / 50) / 4)
    fast = Pace("cuda", 200.0, 8000.0)
    waits, does_not = (costs(whole, Machine("cuda", 2, cores), fast).of_run(whole)[0].most for cores in (16, 64))
    assert waits == pytest.approx(100_000 / (16 * 200) / 2)
    assert does_not == pytest.approx(100_000 / 8000 / 2)
    assert costs(whole, Machine("cuda", 100, 64), fast).of_run(whole)[0].most == pytest.approx(1000 / 200), (
        "one shard, one reader"
    )


def test_score_takes_its_rate_on_every_worker_that_has_a_shard():
    for shards, workers in ((100, 4), (2, 4)):
        whole = corpus(shards)
        assert by_stage(costs(whole).of_run(whole))["score"].most == pytest.approx(1000 * shards * 0.01 / min(shards, workers))


def test_fits_take_a_range_unless_their_length_is_given():
    """4 cores, 65.536 s an epoch. The choice: 2 rates, 2 or 8 epochs, 4 pulls at once. Then 6 fits, two rounds."""
    fixed = {"epochs": 4, "learning_rate": 1e-3, "pull": 1}
    chosen, given = (by_stage(costs(whole).of_run(whole)) for whole in (corpus(), corpus(fit=fixed)))
    assert chosen["fit"].least == pytest.approx(65.536 * 2 * (2 + 8)), "heads may stay as they are"
    assert chosen["fit"].most == pytest.approx(65.536 * (2 * (2 + 8) + 2 * 8))
    assert given["fit"].least == given["fit"].most == pytest.approx(65.536 * (4 + 2 * 4))
    assert given["filter"].least == 0, "where nothing is known to be misaligned, nothing is refitted"


def test_requests_of_a_shard():
    """4 parts, 2 tables: each number by hand."""
    few, many = (costs(corpus(shards)) for shards in (100, 200))
    one = [
        (b.writes - a.writes, b.reads - a.reads) for a, b in zip(few.of_run(few.whole), many.of_run(many.whole), strict=True)
    ]
    embed, fit, solve, chosen, score, publish = [(writes / 100, reads / 100) for writes, reads in one]
    assert embed == (4 + 3, 1 + 5), "4 parts, its accounting, two listings; the tar is read and looked at twice, 3 of others"
    assert fit == (0, 4), "every shard is sampled"
    assert (solve, chosen) == ((0, 0), (0, 0))
    assert score == (2, 4)
    assert publish == (1, 2 + 1), "both tables, and the published one for its uids"
    large = costs(corpus(100, 120 << 20))
    assert (large.of_run(large.whole)[0].reads - few.of_run(few.whole)[0].reads) / 100 == 3, "50 MiB a request, and one more"


def test_a_night_costs_its_new_shards_and_a_listing_of_all():
    whole, new = corpus(3000), corpus(NIGHT)
    night, fresh = costs(whole).of_night(), by_stage(costs(new).of_run(new))
    assert night.stored == pytest.approx(sum(fresh[stage].stored for stage in ("embed", "score", "publish")))
    assert night.most == pytest.approx(fresh["embed"].most + fresh["score"].most + NIGHT * 1000 * 1.5e-4 / 4)
    looked_at, drift = 2 + 2 + 2, 4 + 1
    assert night.reads == pytest.approx(NIGHT * (6 + 4 + 2 + looked_at) + SHARDS * drift)
    assert night.writes == pytest.approx(NIGHT * (4 + 3 + 2 + 1) + 3), "the listing of the corpus has 3 pages"
    many = costs(corpus(300_000)).of_night()
    assert (many.most, many.stored, many.reads) == (night.most, night.stored, night.reads)


@pytest.mark.parametrize("more", [{"index": {}}, FORWARD])
def test_what_nights_do_not_know_has_no_price(more):
    assert costs(corpus(3000, **more)).of_night() is None


def test_what_is_not_known_has_no_number():
    whole = corpus()
    found = costs(whole, pace=None)
    table = bill(found.of_run(whole), found.of_night(), found.machine, PRICES)
    assert [row[1:3] for row in table if row[0] in ("embed", "all of it")] == [["?", "?"]] * 2
    assert "?" not in next(row for row in table if row[0] == "score")
    forward = corpus(**FORWARD)
    on_a_gpu = by_stage(costs(forward, Machine("cuda", 1, 8), Pace("cuda", 200.0, 8000.0)).of_run(forward))
    assert math.isnan(on_a_gpu["forward score"].most), "float32 is not what `embed` computes in there"
    assert by_stage(costs(forward).of_run(forward))["forward score"].least == pytest.approx(100_000 * 1.1 / 50 / 4)


@pytest.mark.parametrize(("device", "hour"), [("cuda", 2.5), ("cpu", 0.1)])
def test_prices_multiply(device, hour):
    cost = Cost("score", 900.0, 1800.0, 3e12, 20_000, 500_000)
    requests = 20 * 0.005 + 500 * 0.0004
    assert price(cost, Machine(device, 8, 1), PRICES) == pytest.approx((2 * hour + requests, 4 * hour + requests))
    assert month(cost, PRICES) == pytest.approx(60.0)


def test_a_column_of_prices_says_what_it_is_of_and_is_there_if_prices_are():
    cost = Cost("score", 3600.0, 7200.0, 3e12, 20_000, 500_000)

    def table(**prices) -> list[list[str]]:
        return bill([cost], cost, Machine("cpu", 8, 1), Prices(**prices))

    assert table() == table(gpu_hour=2.0), "no GPU is planned for"
    assert table()[0] == ["on 8 cores", "time", "core hours", "stored", "writes", "reads"]
    assert table()[1] == ["score", "60 min to 2.0 h", "8 to 16", "~3 TB", "~20,000", "~500,000"]
    header, stage, everything, _ = table(core_hour=2.0, thousand_reads=1.0, tb_month=7.0)
    assert header[6:] == ["price of hours, reads", "a month's storage"]
    assert stage[6:] == everything[6:] == ["520 to 530", "~21"]


def test_numbers():
    assert [number(n) for n in (0, 0.004, 0.123, 9.87, 123, 4567, 1_234_567)] == [
        "0",
        "<0.01",
        "0.12",
        "9.9",
        "120",
        "4,600",
        "1,200,000",
    ]
    assert [size(n) for n in (0, 999, 1500, 12.3e6, 5e15)] == ["0 B", "999 B", "1.5 kB", "12.3 MB", "5e+03 TB"]


@pytest.mark.parametrize("value", [-1, "much", float("inf"), float("nan")])
def test_a_price_that_is_none_is_one_line(tmp_path, value):
    (tmp_path / "config.yaml").write_text(f"run: r\ncorpus: {{shards: x}}\nmodel: {{name: m}}\nprices: {{gpu_hour: {value}}}\n")
    with pytest.raises(UserError) as error:
        Config.from_yaml(tmp_path / "config.yaml")
    assert "\n" not in str(error.value)


def plan_of(tmp_path: Path, tiny_model: str, **more) -> Config:
    places = {"corpus": {"shards": str(EMBEDDED / "corpus")}, "targets": {"clean": {"shards": str(EMBEDDED / "target")}}}
    return Config.model_validate(BASE | places | {"run": str(tmp_path / "run"), "model": {"name": tiny_model}} | more)


@pytest.mark.parametrize(
    "more", [{}, {"index": {"rank": [4, 4]}, "score": {"order": 2, "order_rank": [4, 4], "columns": ["normsim_2", "gsc"]}}]
)
def test_everything_is_timed_here(tmp_path, tiny_model, more):
    config = plan_of(tmp_path, tiny_model, workers=3, **more)
    found = plan(config)
    assert found.machine == Machine("cuda" if torch.cuda.is_available() else "cpu", 3, found.machine.cores)
    assert [cost.stage for cost in found.costs] == ["embed", *stages_of(config), "publish"]
    assert all(cost.most > 0 for cost in found.costs)
    assert found.night is None if "index" in more else 0 < found.night.most < math.inf
    assert not (tmp_path / "run").exists()


def test_what_every_set_of_heads_does_counts_for_every_set(monkeypatch):
    """5 folds, 2 checkpoints: a pass over the pairs that takes 20 ms longer takes 0.2 s longer in all of `score`."""
    heads = Heads(torch.randn(6, 4), torch.randn(5, 4), 10.0)
    whole = corpus(batch_size=16, fit={"sample": 32})
    slow = measured.held_out_influence
    then = rates_of(whole, heads, {"clean": 8}).score
    monkeypatch.setattr(measured, "held_out_influence", lambda *of: (time.sleep(0.02), slow(*of))[1])
    pairs = 16 if not torch.cuda.is_available() else 8192
    assert rates_of(whole, heads, {"clean": 8}).score - then > 0.9 * 0.2 / pairs


def test_the_search_for_copies_grows_with_the_sample():
    heads = Heads(torch.randn(64, 8), torch.randn(64, 8), 10.0)
    few, many = (corpus(batch_size=16, fit={"sample": sample}) for sample in (4096, 10 * 4096))
    small, large = (measured.Bench(of, heads, {}, torch.device("cpu")).copies() for of in (few, many))
    assert 3 < large / small < 30


def test_shards_without_pairs_are_planned(tmp_path, tiny_model):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "0.tar").write_bytes(bytes(10_240))
    found = plan(plan_of(tmp_path, tiny_model, corpus={"shards": str(tmp_path / "corpus")}))
    assert (found.datasets[0].pairs, found.pace) == (0, None)


@pytest.mark.parametrize("loss", ["siglip", "dcl"])
def test_other_losses_are_timed(tmp_path, tiny_model, loss):
    assert all(cost.most > 0 for cost in plan(plan_of(tmp_path, tiny_model, loss=loss, score={"columns": ["lemon"]})).costs)
