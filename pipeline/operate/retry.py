"""Read shards again whose pairs failed for a reason that can pass. Faults in a pair's own bytes are not tried again."""

from pipeline.console import say
from pipeline.corpus.reasons import TRANSIENT
from pipeline.errors import UserError
from pipeline.run import run
from pipeline.run_folder.generations import Generations
from pipeline.run_folder.outcome import Outcome
from pipeline.run_folder.started import read_started


def retry(folder: str) -> Outcome | None:
    """Run the last configuration of a folder again. Shards with a transient reason of quarantine are read anew.

    Shards that are not done or have changed are read too, as by `ecif run`.

    Returns:
        The outcome of the run; None if there is nothing to retry.

    Raises:
        UserError: no run there, it has generations, or its inputs are not where they were.
        RunError: see `run`.
    """
    if Generations(folder).exist():
        raise UserError(f"{folder}: `ecif retry` is for runs; a night reads a shard anew whose tar was written anew")
    started = read_started(folder)
    again, left = list[str](), 0
    for datasets in started.datasets():
        for dataset in datasets.values():
            done = dataset.accounting()
            left += len(dataset.shards) - len(done)
            again += [dataset.accounting_url(name) for name, a in done.items() if TRANSIENT & a.quarantined.keys()]
    if not again and not left:
        return None
    say(f"{len(again)} shards are read anew, {left} were not done or have changed")
    return run(started.config, again)
