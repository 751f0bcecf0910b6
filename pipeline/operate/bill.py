"""The table of what the stages of a run cost, and their prices."""

import math
from collections.abc import Callable

from pipeline.operate.costs import Cost, Machine, total
from pipeline.sections import Prices
from pipeline.workers.progress import duration


def bill(costs: list[Cost], night: Cost | None, machine: Machine, prices: Prices) -> list[list[str]]:
    """Rows of cells: a header, each stage, their sum, and a night.

    The columns of prices are there if the prices that they need are.

    Args:
        costs: of each stage.
        night: some new shards later; None where nights can't be.
        machine: what the work is planned for.
        prices: of the configuration.
    """
    rows = [*costs, total("all of it", costs), *([night] if night else [])]
    unit = "GPU" if machine.device == "cuda" else "core"
    workers = f"{unit}s" if machine.workers > 1 else unit
    columns = [
        [f"on {machine.workers} {workers}", *(row.stage for row in rows)],
        ["time", *(_between(row.least, row.most, _duration) for row in rows)],
        [f"{unit} hours", *(_between(*hours(row, machine), number) for row in rows)],
        ["stored", *(_about(size(row.stored)) for row in rows)],
        ["writes", *(_about(number(row.writes)) for row in rows)],
        ["reads", *(_about(number(row.reads)) for row in rows)],
    ]
    if priced := _priced(machine, prices):
        columns.append([f"price of {', '.join(priced)}", *(_between(*price(r, machine, prices), number) for r in rows)])
    if prices.tb_month is not None:
        columns.append(["a month's storage", *(_about(number(month(row, prices))) for row in rows)])
    return [list(row) for row in zip(*columns, strict=True)]


def hours(cost: Cost, machine: Machine) -> tuple[float, float]:
    """Hours of all workers together, at least and at most: idle ones are paid for too."""
    return cost.least * machine.workers / 3600, cost.most * machine.workers / 3600


def price(cost: Cost, machine: Machine, prices: Prices) -> tuple[float, float]:
    """Price of the hours and the requests, at least and at most. What has no price adds nothing."""
    hour = prices.hour(machine.device) or 0.0
    requests = (cost.writes * (prices.thousand_writes or 0.0) + cost.reads * (prices.thousand_reads or 0.0)) / 1000
    least, most = ((hour * of if hour else 0.0) + requests for of in hours(cost, machine))
    return least, most


def month(cost: Cost, prices: Prices) -> float:
    """Price of keeping for a month what is stored."""
    return cost.stored / 1e12 * (prices.tb_month or 0.0)


def size(count: float) -> str:
    """A number of bytes as text, to three digits: 1.23 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def number(value: float) -> str:
    """An estimated number as text, to two digits: 0.12, 3.4, 5,600."""
    if 0 < value < 0.01:
        return "<0.01"
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.2g}"


def _priced(machine: Machine, prices: Prices) -> list[str]:
    """What of a stage has a price."""
    parts = {"hours": prices.hour(machine.device), "writes": prices.thousand_writes, "reads": prices.thousand_reads}
    return [name for name, given in parts.items() if given is not None]


def _duration(seconds: float) -> str:
    return "<1 s" if 0 < seconds < 1 else duration(seconds)


def _between(least: float, most: float, text: Callable[[float], str]) -> str:
    """An estimate from `least` to `most`."""
    if math.isnan(most):
        return "?"
    low, high = text(least), text(most)
    return _about(low) if low == high else f"{low} to {high}"


def _about(text: str) -> str:
    return text if text.startswith(("<", "0 ")) or text == "0" else f"~{text}"
