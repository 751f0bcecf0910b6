"""The command `ecif select`."""

from typing import Annotated, Literal

import typer

from pipeline.console import say
from pipeline.errors import UserError
from pipeline.places import at_home


def select(  # noqa: PLR0913  (each is an option of the command)
    run: Annotated[str, typer.Argument(metavar="RUN", parser=at_home, help="folder of a run, path or URL")],
    out: Annotated[str, typer.Option(metavar="PATH", parser=at_home, help="the file to write, .npy or .parquet")],
    keep: Annotated[float | None, typer.Option(help="share of the pairs to keep; by default what the run chose")] = None,
    by: Annotated[str | None, typer.Option(help="the column to rank by; by default the run's filter")] = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="CONDITION", help="only pairs of which this holds: `clip_score > 0.2 and not influence_coco < 0`"),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="keep the share of each group with one value in this column, as of each shard"),
    ] = None,
    within: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="only pairs of this subset; of all of them if it is given again")
    ] = None,
    plus: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="the pairs of this subset too, whatever the other options say")
    ] = None,
    written: Annotated[
        Literal["datacomp", "keys"], typer.Option("--format", help="datacomp: uids as .npy; keys: shard and key as Parquet")
    ] = "datacomp",
    sampled: Annotated[
        Literal["best", "soft-cap"],
        typer.Option("--sample", help="best: each of the best pairs once; soft-cap: draws by the column's softmax"),
    ] = "best",
    draws: Annotated[int | None, typer.Option(help="soft-cap: number of draws, in the place of --keep")] = None,
    penalty: Annotated[
        float | None, typer.Option(help="soft-cap: by how much a draw lowers the logit of its pair; by default 0.15")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="soft-cap: logits are this times the column; by default 1 / its standard deviation")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="soft-cap: of the draws; by default 0")] = None,
    generation: Annotated[int | None, typer.Option(metavar="N", help="of nights: this generation, not the last one")] = None,
    since: Annotated[
        int | None, typer.Option(metavar="N", help="of nights: only shards that generation N does not have")
    ] = None,
) -> None:
    """Choose pairs by their columns: a DataComp subset file, or a table of shard and key."""
    from pipeline.results import select as selecting
    from pipeline.results.soft_cap import PENALTY, SoftCap, sample
    from pipeline.results.subset import read_subset
    from pipeline.results.where import Where
    from pipeline.results.write import write_keys, write_subset
    from pipeline.run_folder.finished import open_generation

    soft_cap = sampled == "soft-cap"
    if not soft_cap and any(option is not None for option in (draws, penalty, scale, seed)):
        raise UserError("--draws, --penalty, --scale and --seed need --sample soft-cap")
    if soft_cap and (where is not None or within or plus or per):
        raise UserError("--where, --within, --plus and --per need --sample best: soft-cap draws from all pairs")
    if draws is not None and keep is not None:
        raise UserError("give either --keep, a share of the pairs, or --draws, a number")
    condition = None if where is None else Where(where)
    finished = open_generation(run, generation, since)
    if condition:
        condition.expect_columns(finished.schema())
    if soft_cap:
        by, share = selecting.chosen_filter(finished, by, 1.0 if draws is not None else keep)
        how = SoftCap(None if draws is not None else share, draws, PENALTY if penalty is None else penalty, scale, seed or 0)
        selected = sample(finished.of_shards, by, how)
    else:
        urls = [at_home(url) for url in (*(within or []), *(plus or []))]
        subsets = tuple(map(read_subset, urls))
        limits = selecting.Limits(condition, subsets[: len(within or [])], subsets[len(within or []) :])
        if by is not None or keep is not None or per is not None or not limits.choose:
            by, keep = selecting.chosen_filter(finished, by, keep)
        selected = selecting.select(finished.of_shards, by, 1.0 if keep is None else keep, limits, per)
        for url, subset in zip(urls, subsets, strict=True):
            missing, example = subset.missing()
            if missing:
                say(f"{missing} pairs of {url} are not in the run, such as {example}")
    for line in finished.uids.said():
        say(line)
    if written == "keys":
        write_keys(out, finished.of_shards, selected)
    else:
        unique = finished.uids.pairs == len(selected) and not finished.uids.repeated
        write_subset(out, finished.of_shards, selected, unique)
    kept, copies, most = selected.count()
    if soft_cap:
        say(f"{copies} draws of {kept} pairs by {by}, one pair up to {most} times")
    else:
        say(f"{kept} pairs kept" + (f" by {by}" if by else ""))
    typer.echo(out)
