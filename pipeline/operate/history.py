"""The generations of a run folder, and a way back to one of them."""

from datetime import UTC, datetime
from typing import Any

from rich.filesize import decimal

from pipeline.errors import UserError
from pipeline.run_folder.generations import Generations
from pipeline.storage.lease import hold_folder
from pipeline.workers.progress import duration

HEADER = ["generation", "committed (UTC)", "shards", "pairs", "size", "new", "changed", "gone", "quarantined", "misaligned"]
HEADER += ["drift", "time", "worker hours", "price", "what"]


def history(run: str) -> list[list[str]]:
    """A row for each generation, in the columns of HEADER, the newest first. Drift is what was beyond its bound.

    Raises:
        UserError: there are none.
    """
    rows = []
    for one in Generations(run).history():
        night = one.record["night"]
        when = datetime.fromtimestamp(one.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
        drift = night["drift"]
        counts = [night["new"], night["changed"], night["gone"], sum(night["quarantined"].values())]
        row = [str(one.number), when, str(night["shards"]), str(night["pairs"]), decimal(night["stored"]), *map(str, counts)]
        misaligned = "" if not drift or drift["misaligned"] is None else f"{drift['misaligned']:.1%}"
        price = "" if night.get("price") is None else f"{night['price']:.3g}"  # earlier nights did not say it
        row += [misaligned, ", ".join(drift.get("beyond", [])), duration(sum(night["seconds"].values()))]
        row += [f"{night['worker_hours']:.3g}", price, _what(one.number, one.record)]
        rows.append(row)
    if not rows:
        raise UserError(f"{run}: no generations there, which `ecif nightly` makes")
    return rows


def rollback(run: str, number: int) -> int:
    """Commit an earlier generation again, as the newest one. Nothing is computed, and nothing is deleted.

    Returns:
        The number of the new generation.

    Raises:
        UserError: there is no such generation, it is the last one, it was pruned, or a night is at work.
    """
    generations = Generations(run)
    generations.at(number)  # before anything is written
    with hold_folder(run):
        last, then = generations.at(None), generations.at(number)
        if last.number == number:
            raise UserError(f"{run}: generation {number} is the last one")
        generations.expect_whole(then)
        night = then.record["night"] | {"new": 0, "changed": 0, "gone": 0, "scored": 0, "quarantined": {}, "again": number}
        night |= {"bytes": 0, "seconds": {}, "worker_hours": 0.0, "price": None, "drift": {}}
        return generations.commit(then.files, then.record | {"night": night}, last)


def _what(number: int, record: dict[str, Any]) -> str:
    """What a generation is, where it is no plain addition."""
    if (again := record["night"].get("again")) is not None:
        return f"generation {again} again"
    if record["reference"]["since"] == number:
        return "everything scored anew" if number else "the first"
    return ""
