"""Why a pair can't be used: a closed list."""

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
]
REASONS: tuple[str, ...] = get_args(Reason)
# What another attempt may not find again: the shard was still being written, the device computed wrongly. All other reasons
# are functions of a pair's bytes.
TRANSIENT: frozenset[str] = frozenset({"truncated_shard", "non_finite_features"})


class Refused(Exception):
    """A pair is unusable for a reason of the closed list."""

    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail[:300].encode("utf-8", "backslashreplace").decode()
