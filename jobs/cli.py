"""The command line: one function for each command of `ecif`. Each calls the pipeline and prints the result."""

import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel
from ray.exceptions import RayError

from jobs.nights import RunFolder, history, nightly, prune, rollback
from jobs.select import select
from jobs.submit import submit
from pipeline.config import Config
from pipeline.console import aligned, say, show_on_terminal
from pipeline.errors import RunError, UserError
from pipeline.kinds import OfKind
from pipeline.places import at_home

if TYPE_CHECKING:
    from pipeline.run_folder.outcome import Outcome

app = typer.Typer(
    help="Influence of every image-text pair on a CLIP model: find misaligned pairs, filter, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, path or URL; see `ecif config`")]


def _print_versions(asked: bool) -> None:
    if asked:
        libraries = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "open_clip_torch"))
        typer.echo(f"ecif {version('ecif')} (Python {platform.python_version()}, {libraries})")
        raise typer.Exit


@app.callback()
def _before_any_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_versions, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Options of `ecif` itself."""


@app.command()
def demo(
    out: Annotated[str, typer.Option(metavar="PATH", parser=at_home, help="where everything goes")] = "runs/demo",
    noise: Annotated[float, typer.Option(min=0.01, max=0.9, help="share of captions to swap")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="of the swaps")] = 0,
) -> None:
    """The whole story on the embedded corpus: plant swapped captions, run, filter, refit, judge."""
    from jobs.demo.story import run_demo

    run_demo(Path(out), noise, seed)


@app.command()
def run(config: ConfigFile) -> None:
    """Embed, fit, solve, filter, score, publish. The same command resumes."""
    from pipeline.run import run as run_pipeline

    with redirect_stdout(sys.stderr):  # Ray prints messages on lost processes, which do not belong to the result
        outcome = run_pipeline(Config.from_yaml(config))
    _report(outcome)


app.command()(submit)
for command in (nightly, history, rollback, prune):
    app.command()(command)


@app.command()
def plan(config: ConfigFile) -> None:
    """What a run would read, do, store and cost; nothing is started."""
    from pipeline.operate import plan as estimate
    from pipeline.operate.bill import bill

    asked = Config.from_yaml(config)
    planned = estimate.plan(asked)
    for line in planned.notes:
        say(line)
    typer.echo(aligned([estimate.HEADER, *(dataset.cells() for dataset in planned.datasets)]))
    typer.echo("\n" + aligned(bill(planned.costs, planned.night, planned.machine, asked.prices)))
    if planned.pace:
        typer.echo(planned.pace)


@app.command()
def model(config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see `ecif config`")]) -> None:
    """What a run would load as its model, and whether it tells drawn images apart."""
    from pipeline.operate.model import describe

    for one in Config.from_yaml(config).model.each():
        described = describe(one)
        typer.echo("\n".join(f"{fact:<15} {text}" for fact, text in described.facts.items()))
        if described.warning:
            say(described.warning)


@app.command()
def status(run: RunFolder) -> None:
    """How far a run is, also while it goes on elsewhere."""
    from pipeline.operate import status

    typer.echo(aligned([status.HEADER, *(stage.cells() for stage in status.status(run))]))


@app.command()
def verify(run: RunFolder) -> None:
    """Check that a finished run is whole; a violation is exit code 1."""
    from pipeline.operate.check_shard import Violation
    from pipeline.operate.verify import verify

    wrong = 0

    def report(violation: Violation) -> None:
        nonlocal wrong
        wrong += 1
        typer.echo(f"{violation.url}: {violation.wrong}")

    checked = verify(run, report)
    if wrong:
        raise RunError(f"{run}: {wrong} violations")
    header = ["", "shards", "parts", "pairs", "embedded", "quarantined", "scored"]
    rows = [
        [name, *map(str, (c.shards, c.parts, c.pairs, c.embedded, c.quarantined.total(), c.scored))]
        for name, c in checked.items()
    ]
    typer.echo(aligned([header, *rows]))


@app.command()
def retry(run: RunFolder) -> None:
    """Read anew the shards that failed for a reason that can pass, and run the folder's configuration again."""
    from pipeline.corpus.reasons import TRANSIENT
    from pipeline.operate.retry import retry

    with redirect_stdout(sys.stderr):
        outcome = retry(run)
    if outcome is None:
        say(f"nothing to retry: every shard is done, and none has a reason that can pass ({', '.join(sorted(TRANSIENT))})")
    else:
        _report(outcome)


app.command()(select)


@app.command()
def export(
    run: RunFolder,
    subset: Annotated[
        str,
        typer.Option(
            metavar="PATH", parser=at_home, help="what `ecif select` wrote: a DataComp subset, or a table of shard and key"
        ),
    ],
    out: Annotated[str, typer.Option(metavar="PATH", parser=at_home, help="folder for the new shards")],
    writer: Annotated[
        str, typer.Option("--format", help="webdataset, or package.module:Class for a Writer of your own")
    ] = "webdataset",
    generation: Annotated[int | None, typer.Option(metavar="N", help="of nights: this generation, not the last one")] = None,
    since: Annotated[
        int | None, typer.Option(metavar="N", help="of nights: only shards that generation N does not have")
    ] = None,
) -> None:
    """Write the selected pairs as shards for training."""
    from pipeline.results.export import export

    done = export(run, subset, out, writer, generation, since)
    if done.usage and done.without_txt:
        say(f"{done.without_txt} of {done.pairs} pairs have no .txt: the trainer reads captions nowhere else, and skips them")
    say(f"{done.pairs} pairs in {done.shards} shards" + ("; to train on them:" if done.usage else ""))
    typer.echo(done.usage or out)


@app.command()
def config() -> None:
    """Explain every key of the configuration file."""
    _explain(Config, "")


def main() -> None:
    """Entry point: one clear line for a user's mistake (exit code 2) or a failed run (exit code 1)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come from local files, so nothing is looked up online
    show_on_terminal()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is answered as Ctrl-C is
    try:
        os.getcwd()
    except FileNotFoundError:  # native libraries end the process with words of their own there
        say("ecif: the working directory does not exist any more: change to one that does")
        sys.exit(2)
    try:
        app()
    except UserError as error:
        say(f"ecif: {error}")
        sys.exit(2)
    except (RunError, OSError) as error:  # OSError: a store does not answer, or refuses
        say(f"ecif: {' '.join(str(error).split())}")
        sys.exit(1)
    except RayError as error:
        say(str(error).strip())  # a bug: the traceback helps to mend it
        cause = getattr(error, "cause", error)
        what = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
        say(f"ecif: the run failed: {what} (what is written is whole; the same command resumes)")
        sys.exit(1)


def _report(outcome: "Outcome") -> None:
    from pipeline.corpus.glance import SMALL

    checkpoints = outcome.finished.checkpoints
    for i, checkpoint in enumerate(checkpoints):
        which = f", checkpoint {i}" if len(checkpoints) > 1 else ""
        for name, facts in checkpoint.targets.items():
            for line in _of_target(facts):
                say(f"target {name}{which}: {line}")
    facts = next(iter(checkpoints[0].targets.values()))
    share = facts["misaligned"]
    told = "unknown" if share is None else f"{share:.1%} of the pairs"
    low, high = facts["misaligned_at_least"], facts["misaligned_at_most"]
    say(f"misaligned, as far as swaps tell: {told}, between {low:.1%} and {high:.1%}")
    bad = ", ".join(f"{count} {reason}" for reason, count in outcome.quarantined.items())
    lost = sum(outcome.quarantined.values())
    say(f"{outcome.scored} of {outcome.pairs} pairs scored, {lost} quarantined" + (f": {bad}" if bad else ""))
    if outcome.swallowed:
        say(f"{outcome.swallowed} more members are of pairs lost to a key that ends at the first dot: see corpus.key")
    if outcome.lost:
        say(f"{outcome.lost} more pairs are counted in _stats.json files than the tars hold")
    if outcome.small_shards:
        size = outcome.finished.config.batch_size
        say(f"{outcome.small_shards} shards hold fewer usable pairs than batch_size {size}: {SMALL}")
    for line in (*outcome.finished.uids.said(), *outcome.finished.exact_copies.said()):
        say(line)
    typer.echo(outcome.finished.table)


def _of_target(facts: dict[str, Any]) -> Iterator[str]:
    """The lines that are printed about one target."""
    lds = "" if facts["lds"] is None else f", agreement with {facts['refits']} real refits (LDS) {facts['lds']:.2f}"
    yield f"damping {facts['damping']:g}{lds}"
    if chosen := facts.get("filter"):
        from ecif.filter_choice import said

        yield f"filter: {said(chosen)}"
    if forward := facts.get("forward"):
        reached = f"residual {forward['residual']:.2g} after {forward['iterations']} products"
        yield f"{forward['parameters']} parameters in forward mode, damping {forward['damping']:g}, {reached}"


def _explain(model: type[BaseModel], prefix: str) -> None:
    for name, field in model.model_fields.items():
        section: Any = field.annotation
        if isinstance(section, UnionType):  # an optional section, `Section | None`
            section = get_args(section)[0]
        if isinstance(section, type) and issubclass(section, BaseModel):
            typer.echo(f"\n{prefix}{name}:  # {(section.__doc__ or '').strip()}")
            _explain(section, prefix + "  ")
            continue
        if get_origin(section) is dict:
            typer.echo(f"\n{prefix}{name}:  # {field.description}")
            typer.echo(f"{prefix}  NAME:  # {(get_args(section)[1].__doc__ or '').strip()}")
            _explain(get_args(section)[1], prefix + "    ")
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        typer.echo(f"{prefix}{name}:  # {field.description} ({default})")
    if issubclass(model, OfKind):
        for name, kind in model.kinds().items():
            typer.echo(f"{prefix}# {model.named_by}: {name}  {(kind.__doc__ or '').strip().splitlines()[0]}")
            _explain(model.further_keys(kind), prefix)
        typer.echo()


if __name__ == "__main__":
    main()
