"""What tests look at in a run folder."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pipeline import storage
from pipeline.operate.verify import Violation, verify

COLUMNS = ["shard", "index", "key", "uid", "image_hash", "batch", "fold", "clip_score", "held_out_cosine"]
COLUMNS += ["held_out_loss", "agreement", "image_copies", "caption_copies"]
COLUMNS += ["influence_positive_clean", "influence_negative_clean", "influence_clean", "agreement_clean", "near_clean"]
COLUMNS += ["misalignment", "filter_clean"]
STATE = ("lease/", "started.json", "run.json")  # say when a run was and who ran it
COMPACTED = "accounting/"  # what other objects say, with the time at which local ones were written


def objects(folder: Path | str, *suffixes: str) -> dict[str, bytes]:
    """Objects whose names end in one of the suffixes, but for compacted ones: name below the folder -> bytes."""
    found = [item for suffix in suffixes for item in storage.listing(str(folder), suffix)]
    base = str(folder).rstrip("/") + "/"
    names = {item.url.partition(base)[2]: item.url for item in found}
    return {name: storage.read_bytes(url) for name, url in names.items() if COMPACTED not in name}


def result(run: Path | str) -> dict[str, bytes]:
    """What a run is for: features, accounting, heads, directions, columns; the same wherever and whenever it ran."""
    found = objects(run, ".parquet", ".safetensors", ".json")
    made = {name: data for name, data in found.items() if not name.startswith(STATE)}
    return {name: _anywhere(data) if name.endswith(".json") else data for name, data in made.items()}


def _anywhere(accounting: bytes) -> bytes:
    """Without the shard's etag, which each store makes in its own way."""
    return json.dumps({key: value for key, value in json.loads(accounting).items() if key != "etag"}).encode()


class Change(NamedTuple):
    """What a run did to its folder, but for what says when it was and who ran it."""

    new: Counter[str]  # objects of each kind, and of each target or column of it
    rewritten: set[str]
    gone: set[str]


def state_of(folder: Path | str) -> dict[str, str]:
    """The objects of a run folder, and what tells whether one was rewritten."""
    base = str(folder).rstrip("/") + "/"
    found = {item.url.partition(base)[2]: f"{item.etag} {item.modified}" for item in storage.listing(str(folder), "")}
    return {name: etag for name, etag in found.items() if not name.startswith(STATE) and COMPACTED not in name}


def change_since(before: dict[str, str], folder: Path | str) -> Change:
    """What has happened to a folder since `state_of` it."""
    after = state_of(folder)
    rewritten = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    return Change(Counter(map(kind_of, after.keys() - before.keys())), rewritten, before.keys() - after.keys())


def kind_of(name: str) -> str:
    """From influence/clean/<16 digits>/00000.<16 digits>.parquet to influence/clean; latest/00000.parquet is latest."""
    found, *below = re.split(r"/[0-9a-f]{16}[/.]", name)
    return found if below else found.partition("/")[0]


def violations(folder: Path) -> list[tuple[str, str]]:
    """What `verify` finds: objects, relative to the run and without fingerprints, and what is wrong with them."""
    found: list[Violation] = []
    verify(str(folder), found.append)
    return [(_without_fingerprints(violation.url.split("/run/")[-1]), violation.wrong) for violation in found]


def _without_fingerprints(name: str) -> str:
    """From index/<16 digits>/00000.<16 digits>.parquet to index/00000.parquet."""
    return re.sub(r"[/.][0-9a-f]{16}(?=[/.]|$)", "", name)
