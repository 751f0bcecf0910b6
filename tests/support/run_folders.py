"""What tests look at in a run folder."""

import json
from pathlib import Path

from pipeline import storage
from pipeline.operate.verify import Violation, verify

COLUMNS = ["shard", "index", "key", "uid", "batch", "fold", "clip_score", "held_out_loss", "agreement"]
COLUMNS += ["influence_positive_clean", "influence_negative_clean", "influence_clean", "misalignment", "filter_clean"]
STATE = ("lease/", "plan.json", "run.json")  # say when a run was and who ran it


def objects(folder: Path | str, *suffixes: str) -> dict[str, bytes]:
    """Objects whose names end in one of the suffixes: name below the folder -> bytes."""
    found = [item for suffix in suffixes for item in storage.listing(str(folder), suffix)]
    base = str(folder).rstrip("/") + "/"
    return {item.url.partition(base)[2]: storage.read_bytes(item.url) for item in found}


def result(run: Path | str) -> dict[str, bytes]:
    """What a run is for: features, accounting, heads, directions, columns; the same wherever and whenever it ran."""
    found = objects(run, ".parquet", ".safetensors", ".json")
    made = {name: data for name, data in found.items() if not name.startswith(STATE)}
    return {name: _anywhere(data) if name.endswith(".json") else data for name, data in made.items()}


def _anywhere(accounting: bytes) -> bytes:
    """Without the shard's etag, which each store makes in its own way."""
    return json.dumps({key: value for key, value in json.loads(accounting).items() if key != "etag"}).encode()


def violations(folder: Path) -> list[tuple[str, str]]:
    """What `verify` finds: objects, relative to the run and without fingerprints, and what is wrong with them."""
    found: list[Violation] = []
    verify(str(folder), found.append)
    return [("/".join(p for p in v.url.split("/run/")[-1].split("/") if len(p) != 16), v.wrong) for v in found]
