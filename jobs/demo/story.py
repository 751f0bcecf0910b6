"""`ecif demo`: plant swapped captions in a real corpus, find them by influence, and judge the result by training on it."""

import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from jobs.demo import model, picture
from jobs.demo.plant import plant
from jobs.demo.table import HEADINGS, cells
from pipeline import storage
from pipeline.config import Config
from pipeline.console import say
from pipeline.errors import UserError
from pipeline.results.export import export
from pipeline.results.judge import judge
from pipeline.results.select import chosen_filter, select
from pipeline.results.write import write_subset
from pipeline.run import run
from pipeline.run_folder import tables
from pipeline.run_folder.outcome import Outcome
from pipeline.sections import Pairs

TARGET = "fluent"


def run_demo(out: Path, noise: float, seed: int) -> None:
    """Run the demo below `out`; what is there already is not done again.

    Writes `corpus/` (the noisy copy), `truth/swapped.json`, `config.yaml`, `run/` with the columns and `summary.json`,
    `filtered/` and `result.png`.

    Raises:
        UserError: the demo's model wheels are not installed, or `out` holds a demo with other settings.
    """
    started = time.monotonic()
    embedded = Path(str(files("jobs.demo") / "corpus"))
    truth, settings = out / "truth" / "swapped.json", out / "truth" / "settings.json"
    asked = {"noise": noise, "seed": seed}
    if settings.exists() and json.loads(settings.read_text()) != asked:
        raise UserError(f"{out} holds a demo with other settings ({settings.read_text().strip()}): give another --out")
    if not truth.exists():
        storage.write_bytes(str(settings), json.dumps(asked).encode())
        say(f"demo     swapping {noise:.0%} of the captions")
        plant(embedded / "corpus", out / "corpus", truth, noise, seed)
    swapped = set(json.loads(truth.read_text()))
    config = _config(out, embedded)
    outcome = run(config)
    say(f"{outcome.scored} of {outcome.pairs} pairs scored, {sum(outcome.quarantined.values())} quarantined")
    verdict = judge(config.run, Pairs(shards=str(embedded / "test")), swapped)

    scores = outcome.scores()
    subset = str(out / "subset.npy")
    of_shards = outcome.finished.of_shards
    write_subset(subset, of_shards, select(of_shards, *chosen_filter(outcome.finished, None, None)))
    exported = export(config.run, subset, str(out / "filtered"))
    picture.draw(scores, config.corpus, config, TARGET, out / "result.png")
    summary = verdict | {
        "exported": {"shards": exported.shards, "pairs": exported.pairs},
        "time": _time(outcome, time.monotonic() - started),
    }
    url = storage.join(config.run, "summary.json")
    if summary["time"]["projection_over_forward_pass"] is None and storage.exists(url):
        summary["time"] = json.loads(storage.read_bytes(url))["time"]  # of the call that did the work
    storage.write_bytes(url, tables.json_bytes(summary))
    _print(summary, out)


def _config(out: Path, embedded: Path) -> Config:
    """The demo's configuration, written where `ecif run` can take it up from any directory."""
    out = out.absolute()
    try:
        name = model.build_model(out / "model")
    except ImportError as error:
        raise UserError(f"the demo's model is not installed ({error.name}): pip install 'ecif[demo]'") from None
    config = {
        "run": str(out / "run"),
        "corpus": {"shards": str(out / "corpus")},
        "model": {"name": name},
        "targets": {TARGET: {"shards": str(embedded / "target")}},
    }
    storage.write_bytes(str(out / "config.yaml"), yaml.safe_dump(config, sort_keys=False).encode())
    return Config.model_validate(config)


def _time(outcome: Outcome, total: float) -> dict[str, float | None]:
    """Where the time went, and the two ratios that say what influence costs beside the embedding; None for what was there."""
    seconds, forward, projection = outcome.seconds, outcome.seconds_a_pair["forward_pass"], outcome.seconds_a_pair["projection"]
    fresh = forward is not None and projection is not None
    return {
        **{f"{key}_s": value for key, value in seconds.items()},
        "total_s": total,
        "fit_solve_filter_score_over_embed": sum(seconds[key] for key in ("fit", "solve", "filter", "score")) / seconds["embed"]
        if fresh
        else None,
        "forward_pass_ms_a_pair": 1000 * forward if forward is not None else None,
        "projection_ms_a_pair": 1000 * projection if projection is not None else None,
        "projection_over_forward_pass": projection / forward if forward is not None and projection is not None else None,
    }


def _print(summary: dict[str, Any], out: Path) -> None:
    console = Console(width=120)
    table = Table(
        title=f"{summary['swapped']} of {summary['pairs']} captions swapped; all rules but the chosen filter drop as many"
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    for row in cells(summary):
        table.add_row(*row)
    console.print(table)
    lds, times = summary["lds"][TARGET], summary["time"]
    console.print(
        f"influence against {lds['refits']} real refits (LDS): {lds['lds']:.2f} on the target's loss, "
        f"{lds['lds_of_target_parts']:.2f} on {lds['parts']} parts of it"
    )
    if times["projection_over_forward_pass"] is not None:
        cost = f"score costs {times['projection_over_forward_pass']:.3f} of the forward pass, a pair"
        stages = f"fit, solve, filter and score {times['fit_solve_filter_score_over_embed']:.2f} of embed"
        console.print(f"{cost}; {stages} ({times['total_s']:.0f} s in all)")
    for name, what in (
        ("run/latest", "the columns of every pair, Parquet"),
        ("filtered", "filtered shards"),
        ("result.png", "the pairs at the ends of the scores"),
        ("run/summary.json", "the numbers above"),
        ("config.yaml", "the configuration: `ecif run` takes it up again"),
    ):
        console.print(f"  {out / name}  [dim]{what}[/dim]", soft_wrap=True)
