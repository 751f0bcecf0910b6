"""What Prometheus sees of a run: Ray exports these from the driver's node. infra/grafana.json shows them.

| metric | labels | is |
|---|---|---|
| `ray_ecif_stage_share` | stage | gauge, how far a stage is, 0 to 1 |
| `ray_ecif_pairs_total` | stage | counter, pairs that a stage has done |
| `ray_ecif_shards` | stage, state (`done`, `left`) | gauge, shards of a stage |
| `ray_ecif_quarantined_pairs_total` | reason | counter, pairs that could not be used |
| `ray_ecif_model_seconds_total` | state (`busy`, `readers`, `storage`) | counter, what models of `embed` did or waited for |
| `ray_ecif_generation` | | gauge, number of the generation that a night committed |
| `ray_ecif_night_shards` | state (`new`, `changed`, `gone`, `left`) | gauge, shards of a night |
| `ray_ecif_night_pairs` | state (`scored`, `quarantined`, `all`) | gauge, pairs of a night, and of its generation |
| `ray_ecif_night_misaligned` | | gauge, mean probability of misalignment of the pairs of a night |
| `ray_ecif_night_drift` | measure | gauge, how the pairs of a night differ from the sample |
| `ray_ecif_night_seconds` | stage | gauge, wall time of each stage of a night |
"""

from functools import cache
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge


def share(stage: str, done: float) -> None:
    """A stage has done this share of its work."""
    _set("ecif_stage_share", "how far a stage is, 0 to 1", min(1.0, done), stage=stage)


def pairs(stage: str, more: float) -> None:
    """A stage has done so many more pairs."""
    _add("ecif_pairs_total", "pairs that a stage has done", more, stage=stage)


def shards(stage: str, done: int, left: int) -> None:
    """So many shards of a stage are done, and so many are left."""
    for state, count in (("done", done), ("left", left)):
        _set("ecif_shards", "shards of a stage", count, stage=stage, state=state)


def quarantined(reasons: dict[str, int]) -> None:
    """So many more pairs could not be used, by reason."""
    for reason, more in reasons.items():
        _add("ecif_quarantined_pairs_total", "pairs that could not be used", more, reason=reason)


def model_seconds(busy: float, readers: float, storage: float) -> None:
    """The models of `embed` were busy for so many more seconds, and waited for readers and for storage."""
    for state, more in (("busy", busy), ("readers", readers), ("storage", storage)):
        _add("ecif_model_seconds_total", "what models did or waited for", more, state=state)


def night(generation: int, did: dict[str, Any]) -> None:
    """A night has committed a generation; `did` is what its record says of it."""
    _set("ecif_generation", "number of the generation that a night committed", generation)
    for state in ("new", "changed", "gone", "left"):
        _set("ecif_night_shards", "shards of a night", did[state], state=state)
    for state, count in (("scored", did["scored"]), ("quarantined", sum(did["quarantined"].values())), ("all", did["pairs"])):
        _set("ecif_night_pairs", "pairs of a night, and of its generation", count, state=state)
    if drift := did["drift"]:
        if drift["misaligned"] is not None:
            _set("ecif_night_misaligned", "mean probability of misalignment of the pairs of a night", drift["misaligned"])
        for measure, (value, _) in drift["measures"].items():
            _set("ecif_night_drift", "how the pairs of a night differ from the sample", value, measure=measure)
    for stage, seconds in did["seconds"].items():
        _set("ecif_night_seconds", "wall time of each stage of a night", seconds, stage=stage)


def _set(name: str, what: str, value: float, **labels: str) -> None:
    if ray.is_initialized():
        _metric(Gauge, name, what, *labels).set(value, labels)


def _add(name: str, what: str, more: float, **labels: str) -> None:
    if more > 0 and ray.is_initialized():  # Ray refuses 0
        _metric(Counter, name, what, *labels).inc(more, labels)


@cache
def _metric(kind: type[Any], name: str, what: str, *labels: str) -> Any:
    """One object for each name in a process."""
    return kind(name, description=what, tag_keys=labels)
