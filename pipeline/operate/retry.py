"""Take up what failed for a reason that can pass; what is wrong with a pair's own bytes is not tried again."""

from pipeline.console import say
from pipeline.corpus.reasons import TRANSIENT
from pipeline.run import Outcome, run
from pipeline.run_folder.started import read_plan


def retry(folder: str) -> Outcome | None:
    """Run the last configuration of a folder again, with the shards read anew that have a transient reason.

    Shards that are not done, or have changed, are taken up too, as by `ecif run`.

    Returns:
        What the run did; None where nothing can be retried.

    Raises:
        UserError: no run there, or its inputs are not where they were.
        RunError: as of `run`.
    """
    plan = read_plan(folder)
    again, left = list[str](), 0
    for datasets in plan.datasets():
        for dataset in datasets.values():
            done = dataset.accounting()
            left += len(dataset.shards) - len(done)
            again += [dataset.accounting_url(name) for name, a in done.items() if TRANSIENT & a.quarantined.keys()]
    if not again and not left:
        return None
    say(f"{len(again)} shards are read anew, {left} were not done or have changed")
    return run(plan.config, again)
