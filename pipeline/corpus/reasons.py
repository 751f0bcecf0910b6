"""The closed list of reasons why a pair can't be used."""

from typing import Literal, get_args

Reason = Literal[
    "missing_image",
    "missing_caption",
    "empty_caption",
    "bad_label",
    "bad_encoding",
    "bad_json",
    "too_large_member",
    "too_many_pixels",
    "truncated_image",
    "undecodable_image",
    "duplicate_key",
    "truncated_shard",
    "non_finite_features",
    "alone_in_shard",
]
REASONS: tuple[str, ...] = get_args(Reason)
# Reasons that can pass: the shard was still being written, or the device computed wrongly. All other reasons are functions of
# the bytes of a pair.
TRANSIENT: frozenset[str] = frozenset({"truncated_shard", "non_finite_features"})


class Refused(Exception):
    """Raised when a pair can't be used, with a reason of the closed list."""

    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail[:300].encode("utf-8", "backslashreplace").decode()
