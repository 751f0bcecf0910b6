"""What the shards of a generation are scored with: heads, directions and filters, learned from the corpus of some night."""

import json
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.config import Config
from pipeline.run_folder.artifacts import Artifacts, fingerprint, names
from pipeline.run_folder.contents import pinned, usable
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.finished import Checkpoint
from pipeline.run_folder.tables import json_bytes


class Learned(NamedTuple):
    """What was learned with one checkpoint of the model."""

    record: Checkpoint
    contents: dict[str, str]  # fingerprints of what it was learned from, see `run_folder.contents`

    def is_asked_for(self, config: Config, targets: dict[str, Dataset], corpus: Dataset) -> bool:
        """Whether this configuration and these targets ask for the columns that it gives."""
        same = learned_with(config, corpus).items() <= self.contents.items()
        return same and self.names(config, targets) == self.record.names

    def names(self, config: Config, targets: dict[str, Dataset]) -> dict[str, str]:
        """Names of the objects that this configuration and these targets ask for, of the same sample."""
        return names(config, pinned(config, targets, self.contents))

    def artifacts(self, folder: str, corpus: Dataset) -> Artifacts:
        """Where the objects of a corpus, or of a part of it, are."""
        return Artifacts(folder, self.record.names, usable(corpus.accounting()), corpus.part)


def learned_with(config: Config, corpus: Dataset) -> dict[str, str]:
    """Fingerprints of what makes a reference another one and is in no name: how many pairs are sampled, and columns carried."""
    carried = str(corpus.sidecars.schema) if corpus.sidecars else ""
    return {"sample_limit": fingerprint(config.fit.sample), "carried": fingerprint(carried)}


class Reference(NamedTuple):
    """What the shards of a generation are scored with. Generations of two references share no file."""

    checkpoints: list[Learned]
    since: int  # number of the first generation that was scored with it
    unusable: float  # share of the corpus's pairs that could not be used when it was learned

    def facts(self) -> dict[str, Any]:
        """In plain values."""
        checkpoints = [[one.record._asdict(), one.contents] for one in self.checkpoints]
        return {"since": self.since, "unusable": self.unusable, "checkpoints": checkpoints}


def reference_from(facts: dict[str, Any]) -> Reference:
    """The inverse of `Reference.facts`."""
    checkpoints = [Learned(Checkpoint(**record), contents) for record, contents in facts["checkpoints"]]
    return Reference(checkpoints, facts["since"], facts["unusable"])


def read_pending(folder: str) -> Reference | None:
    """What a renewal has learned that was not done by its deadline, or was killed; None if there is none."""
    try:
        return reference_from(json.loads(storage.read_bytes(_pending(folder))))
    except FileNotFoundError:
        return None


def write_pending(folder: str, reference: Reference) -> None:
    """Keep what a renewal has learned, until all shards are scored with it."""
    storage.write_bytes(_pending(folder), json_bytes(reference.facts()))


def delete_pending(folder: str) -> None:
    """End a renewal."""
    if storage.exists(_pending(folder)):
        storage.delete(_pending(folder))


def _pending(folder: str) -> str:
    return storage.join(folder, "renewal.json")
