"""The command line: a table of contents of what the system does."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel, ValidationError
from ray.exceptions import RayError

from pipeline.config import Config
from pipeline.errors import RunError, UserError
from pipeline.progress import say

app = typer.Typer(
    help="Influence of every image-text pair on a CLIP model: find misaligned pairs, filter, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="folder of a run, path or URL")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where everything goes")] = Path("runs/demo"),
    noise: Annotated[float, typer.Option(min=0.01, max=0.9, help="share of captions to swap")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="of the swaps")] = 0,
) -> None:
    """The whole story on the embedded corpus: plant swapped captions, run, filter, refit, judge."""
    from jobs.demo.story import tell

    tell(out, noise, seed)


@app.command()
def run(config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see `ecif config`")]) -> None:
    """Embed, fit, solve, score. The same command resumes."""
    from pipeline.run import run as run_pipeline

    outcome = run_pipeline(read_config(config))
    for name, facts in outcome.targets.items():
        lds = "" if facts["lds"] is None else f", agreement with {facts['refits']} real refits (LDS) {facts['lds']:.2f}"
        say(f"target {name}: damping {facts['damping']:g}{lds}")
    bad = ", ".join(f"{count} {reason}" for reason, count in outcome.quarantined.items())
    lost = sum(outcome.quarantined.values())
    say(f"{outcome.scored} of {outcome.pairs} pairs scored, {lost} quarantined" + (f": {bad}" if bad else ""))
    typer.echo(outcome.scores)


@app.command()
def select(
    run: RunFolder,
    out: Annotated[str, typer.Option(help="the subset file to write, .npy")],
    keep: Annotated[float, typer.Option(help="share of the pairs to keep")],
    by: Annotated[str, typer.Option(help="the column to rank by")] = "misalignment",
) -> None:
    """Keep the best share of the pairs by one column: a DataComp subset file."""
    from pipeline.select import read_scores, select, write_subset

    uids = select(read_scores(run, ["uid", by]), by, keep)
    write_subset(out, uids)
    say(f"{len(uids)} pairs kept by {by}")
    typer.echo(out)


@app.command()
def export(
    run: RunFolder,
    subset: Annotated[str, typer.Option(help="DataComp subset file")],
    out: Annotated[str, typer.Option(help="folder for the new shards")],
) -> None:
    """Write the selected pairs as WebDataset shards."""
    from pipeline.export import export

    done = export(run, subset, out)
    say(f"{done['pairs']} pairs in {done['shards']} shards; to train on them with open_clip:")
    shards = f"{out}/{{00000..{done['shards'] - 1:05d}}}.tar"
    typer.echo(
        f"python -m open_clip_train.main --dataset-type webdataset --train-data '{shards}' --train-num-samples {done['pairs']}"
    )


@app.command()
def config() -> None:
    """Explain every key of the configuration file."""
    _explain(Config, "")


def read_config(path: Path) -> Config:
    """The validated configuration.

    Raises:
        UserError: with one line about the first thing that is wrong.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        return Config.model_validate(yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "configuration"
        what = "no such key" if first["type"] == "extra_forbidden" else first["msg"]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise UserError(f"{path}: {where}: {what}{more}; `ecif config` explains every key") from None


def main() -> None:
    """Entry point: one clear line for a user's mistake (exit code 2) or a failed run (exit code 1)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come from local files: nothing is looked up
    try:
        app()
    except UserError as error:
        say(f"ecif: {error}")
        sys.exit(2)
    except RunError as error:
        say(f"ecif: {error}")
        sys.exit(1)
    except RayError as error:
        cause = str(error).strip().splitlines()[-1]
        say(f"ecif: the run failed: {cause} (what is written is whole; the same command resumes)")
        sys.exit(1)


def _explain(model: type[BaseModel], prefix: str) -> None:
    for name, field in model.model_fields.items():
        section: Any = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            typer.echo(f"\n{prefix}{name}:  # {(section.__doc__ or '').strip()}")
            _explain(section, prefix + "  ")
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        typer.echo(f"{prefix}{name}:  # {field.description} ({default})")


if __name__ == "__main__":
    main()
