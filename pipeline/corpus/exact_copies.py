"""Exact copies: pairs whose images have the same bytes."""

from typing import NamedTuple


class ExactCopies(NamedTuple):
    """What is known about exact copies of images among some pairs."""

    pairs: int = 0
    repeated: int = 0  # pairs whose image other pairs have too, byte for byte
    example: str = ""  # shard and key of one of them

    def said(self) -> list[str]:
        """What a user has to know about them, a line each."""
        if not self.repeated:
            return []
        return [
            f"{self.repeated:,} of {self.pairs:,} pairs have an image that other pairs have too, byte for byte, such as "
            f"{self.example}"
        ]
