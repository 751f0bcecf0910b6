"""The section about prices: what `ecif plan`, and the record of a night, multiply by."""

from typing import Annotated

from pydantic import Field

from pipeline.sections.section import Section

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Prices(Section):
    """What things cost, in a currency of yours, for `ecif plan` and nights; they change nothing that is computed."""

    gpu_hour: Price | None = Field(None, description="of one GPU for an hour, with its share of a machine")
    core_hour: Price | None = Field(None, description="of one CPU core for an hour, where there is no GPU")
    tb_month: Price | None = Field(None, description="of 1e12 bytes stored for a month")
    thousand_writes: Price | None = Field(None, description="of 1000 requests that write or list: PUT, POST, LIST")
    thousand_reads: Price | None = Field(None, description="of 1000 requests that read: GET, HEAD")

    def hour(self, device: str) -> float | None:
        """Of one worker on such a device, `cuda` or `cpu`, for an hour; None if it is not given."""
        return self.gpu_hour if device == "cuda" else self.core_hour
