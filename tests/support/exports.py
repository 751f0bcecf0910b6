"""A corpus with every peculiarity that an export has to get right, and a subset of it."""

from collections import Counter
from pathlib import Path

import numpy as np

from tests.support.finished import Run
from tests.support.subsets import write_uids
from tests.support.tars import npy, pair, write_tar

UID = "0123456789abcdef" * 2
SHARDS = {
    "a/00000": [
        *pair("000000000", "zero"),
        ("000000001.png", b"no image"),
        ("000000001.txt", b"quarantined: the pairs after it move up by one"),
        *pair("000000002", "two"),
        ("000000003.JSON", b'{"any": 1}'),
        ("000000003.PNG", pair("x")[0][1]),
        ("000000003.txt", b"three"),
        ("000000003.seg.npy", npy(np.arange(3))),
    ],
    "a/00007": pair("000000000", "not selected"),
    "b/00000": [
        *pair("000000000", "the key of another shard's pair"),
        *pair("d/é", "in a folder, not ASCII"),
        *pair("k" * 120, "longer than a header"),
        *pair("5", "five", uid=UID),
        *pair("5-1", "with a key that a copy would have"),
    ],
}
COPIES = {  # by shard: the key of each copied pair, and the key that it is written under
    "a/00000": [("000000002",) * 2, ("000000003",) * 2, ("000000003", "000000003-1"), ("000000003", "000000003-2")],
    "b/00000": [("000000000",) * 2, ("d/é",) * 2, ("k" * 120,) * 2, ("5", "5"), ("5", "5-2"), ("5-1",) * 2],
}
SELECTED = Counter((shard, key) for shard, copies in COPIES.items() for key, _ in copies)


def make_corpus(folder: Path) -> Path:
    for name, members in SHARDS.items():
        write_tar(folder / f"{name}.tar", members)
    return folder


def caption(shard: str, key: str) -> str:
    return dict(SHARDS[shard])[f"{key}.txt"].decode()


def write_selected(run: Run, folder: Path, selected: Counter[tuple[str, str]]) -> str:
    """A subset file of pairs given by shard and key."""
    return write_uids(str(folder / "subset.npy"), [run.uids[place] for place in selected.elements()])
