"""Say what is odd about a shard as a whole: what its writer may not have meant, and which key reads it as it was meant."""

from collections import Counter
from dataclasses import dataclass, field

from pipeline.corpus.captions import lines_of
from pipeline.corpus.pairs import Pair, Quarantined
from pipeline.corpus.tar import WINDOW, Contents
from pipeline.sections import Reading

MISSING = {"missing_caption": "no caption", "missing_image": "no image"}


@dataclass
class Seen:
    """Counts of a shard's pairs, and examples of those that lack an image or a caption."""

    pairs: int = 0
    of_lines: int = 0  # whose caption has several lines
    missing: Counter[str] = field(default_factory=Counter)  # by the reason why they lack an image or a caption
    examples: dict[str, str] = field(default_factory=dict)  # of each reason

    def add(self, pair: Pair | Quarantined) -> None:
        """Count a pair."""
        self.pairs += 1
        if isinstance(pair, Pair):
            self.of_lines += pair.label is None and len(lines_of(pair.caption)) > 1
        elif pair.reason in MISSING:
            self.missing[pair.reason] += 1
            self.examples.setdefault(pair.reason, f"{pair.key}: {pair.detail}")


def remarks(contents: Contents, seen: Seen, reading: Reading, stats: str = "") -> dict[str, str]:
    """What is odd about a shard, by the kind of oddity.

    Args:
        contents: of its tar, read to the end.
        seen: its pairs.
        reading: how it was read.
        stats: what is wrong with its `_stats.json`.
    """
    found = of_layout(contents)
    if 2 * contents.strays > contents.members:
        found["ignored"] = (
            f"{contents.strays} of {contents.members} members are ignored, such as {_shown(contents.stray)}: a member is "
            "<key>.<suffix>, and a file name that begins with a dot has no key"
        )
    for reason, what in MISSING.items():
        if 2 * seen.missing[reason] >= max(1, seen.pairs) and not contents.swallowed:
            example = _shown(seen.examples[reason])
            found[what] = f"{seen.missing[reason]} of {seen.pairs} pairs have {what}, such as {example}"
    if not reading.pick and 2 * seen.of_lines > seen.pairs:
        found["lines"] = (
            f"{seen.of_lines} of {seen.pairs} captions have several lines, each taken as one text; if a line is a caption, say "
            f"caption: {{field: {reading.caption}, pick: first}} or pick: all"
        )
    return found | ({"stats": stats} if stats else {})


def of_layout(contents: Contents) -> dict[str, str]:
    """What is odd about the names of a tar's members and their order."""
    found = {}
    if contents.swallowed:
        found["dots"] = (
            f"{contents.swallowed} members are swallowed by a key that ends at the first dot, such as those of "
            f"{_shown(contents.swallowed_key)}; key: last_dot reads them as pairs of their own"
        )
    if contents.scattered:
        found["scattered"] = (
            f"{contents.scattered} members are not next to others of their key; they are read here, but trainers need the tar "
            "sorted by name (tar --sort=name)"
        )
    if contents.apart:
        found["apart"] = (
            f"{contents.apart} keys come again more than {WINDOW} members later, too far to be put together: sort the tar by "
            "name (tar --sort=name)"
        )
    return found


def _shown(name: str) -> str:
    """A name on one line, whatever is in it."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:200])
