"""What Prometheus sees of a run: Ray exports these from the driver's node. infra/grafana.json shows them.

| metric | labels | is |
|---|---|---|
| `ray_ecif_stage_share` | stage | gauge, how far a stage is, 0 to 1 |
| `ray_ecif_pairs_total` | stage | counter, pairs that a stage has done |
| `ray_ecif_shards` | stage, state (`done`, `left`) | gauge, shards of a stage |
| `ray_ecif_quarantined_pairs_total` | reason | counter, pairs that could not be used |
| `ray_ecif_model_seconds_total` | state (`busy`, `readers`, `storage`) | counter, what models of `embed` did or waited for |
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
