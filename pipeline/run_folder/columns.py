"""The one list of a run's columns: score and publish write them, verify checks them, plan counts them, judge ranks by them."""

from typing import NamedTuple

from ecif.columns import Column, PairScore
from ecif.columns.agreement import agreement_column
from ecif.columns.filter import filter_column
from ecif.columns.influence import LEVERAGE, influence_columns
from ecif.columns.misalignment import MISALIGNMENT
from ecif.columns.near import near_column
from ecif.copies import COPIES
from ecif.registry import find_kind
from pipeline.config import Config

IDENTITY = {  # which pair a row is
    "shard": "Name of the shard: its path below the corpus's root, without .tar.",
    "index": "Position of the pair in its tar, from 0.",
    "key": "Key of the pair in its tar.",
    "uid": "32 hex digits: the uid of its JSON or sidecar, else a hash of shard and key.",
    "image_hash": "32 hex digits: BLAKE2b of the bytes of the image. Pairs with the same have the same image file.",
    "batch": "Number of the batch of its shard that it was fitted in.",
    "fold": "Its fold: it is scored only by heads that never saw this fold.",
}
EVERY_RUN = ("clip_score", "held_out_cosine", "held_out_loss", "agreement")  # in the order of the table


class Requested(NamedTuple):
    """A column of `score.columns`."""

    name: str
    score: type[PairScore]
    target: str  # empty for a score that depends on no target


def score_kind(name: str) -> type[PairScore]:
    """The class of a score, by its name in `score.columns`. Raises ValueError if there is none."""
    return find_kind(PairScore, name)  # type: ignore[type-abstract]


def evidence_scores(config: Config) -> list[type[PairScore]]:
    """The scores that misalignment is learned from: those of every run, and requested ones whose class sets `evidence`."""
    asked = (score_kind(name) for name in config.score.columns)
    return list(dict.fromkeys([*map(score_kind, EVERY_RUN), *(score for score in asked if score.evidence)]))


def requested_columns(config: Config) -> list[Requested]:
    """The columns of `score.columns` that are not evidence. A score of a target has one column for each target."""
    scores = dict.fromkeys(score_kind(name) for name in config.score.columns)
    found = []
    for score in (score for score in scores if not score.evidence):
        for target in config.targets if score.each_target else [""]:
            found.append(Requested(Column.of(score, target).name, score, target))
    return found


def columns(config: Config) -> list[Column]:
    """Every score column of a run, in the order of the table. Sidecar columns come after them."""
    found = [*(Column.of(score) for score in evidence_scores(config)), *COPIES]
    for name, target in config.targets.items():
        found += [*influence_columns(name, target.kind.unit), agreement_column(name), near_column(name)]
    found.append(MISALIGNMENT)
    found += [filter_column(name) for name in config.targets] if config.filter else []
    found += [LEVERAGE] if config.score.order == 2 else []
    return found + [Column.of(column.score, column.target) for column in requested_columns(config)]
