"""The commands about generations: `ecif nightly`, `history`, `rollback` and `prune`."""

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer
from rich.filesize import decimal

from pipeline.config import Config
from pipeline.console import aligned, say
from pipeline.places import at_home

RunFolder = Annotated[str, typer.Argument(metavar="RUN", parser=at_home, help="folder of a run, path or URL")]
EXIT_CODES = {"done": 0, "nothing new": 10, "deadline": 11, "drift": 12}  # 1 and 2 are those of any command


def nightly(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, path or URL; see `ecif config`")],
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="exit code 0 also where it would be 10, 11 or 12")] = False,
) -> None:
    """Embed and score what is new since last night, and commit it as the next generation.

    Exit codes: 0 done, 10 nothing new, 11 stopped at the deadline, 12 done and a bound of drift passed, 1 failed, 2 a mistake.
    """
    from pipeline.night import night

    with redirect_stdout(sys.stderr):
        done = night(Config.from_yaml(config))
    say(f"night: {done.state}")
    if done.generation:
        typer.echo(f"generation {done.generation.number}")
    raise typer.Exit(0 if exit_zero else EXIT_CODES[done.state])


def history(run: RunFolder) -> None:
    """The generations that nights have made."""
    from pipeline.operate import history

    typer.echo(aligned([history.HEADER, *history.history(run)]))


def rollback(run: RunFolder, generation: Annotated[int, typer.Argument(metavar="N", help="number of a generation")]) -> None:
    """Make an earlier generation the last one again. Nothing is computed or deleted."""
    from pipeline.operate.history import rollback

    typer.echo(f"generation {rollback(run, generation)}")


def prune(
    run: RunFolder,
    keep: Annotated[int, typer.Option(metavar="K", help="number of generations to keep, the newest ones")],
    delete: Annotated[bool, typer.Option("--delete", help="delete; without it only what would be deleted is said")] = False,
) -> None:
    """Delete what no kept generation is made of, and what is left of earlier configurations."""
    from pipeline.operate.prune import prune

    done = prune(run, keep, dry_run=not delete)
    for item in done.objects:
        typer.echo(item.url)
    kept = f"; generations {done.kept[-1]} to {done.kept[0]} are kept" if done.kept else ""
    say(f"{len(done.objects)} objects, {decimal(done.size)}{'' if delete else ' would be'} deleted{kept}")
