"""Section about nights: how often what was learned is learned anew, and how long a night may take."""

from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.sections.section import Section


class Renew(Section):
    """When heads, directions and filters are learned anew, and every shard is scored anew."""

    every: PositiveInt | None = Field(None, description="after so many generations")
    drift: bool = Field(False, description="when a bound of `nightly.drift` is passed")

    @model_validator(mode="before")
    @classmethod
    def _never(cls, given: Any) -> Any:
        return {} if given == "never" else given


class Drift(Section):
    """Bounds on how far the pairs of a night may be from the sample that heads and directions were learned from."""

    features: float | None = Field(
        0.9, ge=0.5, le=1, description="AUROC with which a linear classifier tells new images or captions from the sample's"
    )
    held_out_loss: PositiveFloat | None = Field(0.5, description="by which the mean rises, in nats")
    misaligned: float | None = Field(0.1, gt=0, le=1, description="by which the mean probability of misalignment rises")
    quarantined: float | None = Field(0.1, gt=0, le=1, description="by which the share of unusable pairs rises")
    coverage: float | None = Field(0.1, gt=0, le=1, description="by which the share that a target says something about falls")


class Nightly(Section):
    """Of `ecif nightly`, which adds generations to a run folder."""

    renew: Renew = Field(Renew(), description="never, or {every: 7}, or {drift: true}, or both")
    deadline_hours: PositiveFloat | None = Field(
        None, description="after which no further shard is embedded; a night stops with whole shards, and the next goes on"
    )
    drift: Drift = Drift()
