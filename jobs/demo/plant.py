"""Plant noise: copy shards with some captions swapped. The list of the swapped pairs is kept where no pipeline reads."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ecif.permutation import permutation
from pipeline import storage
from pipeline.run_folder import tables


def plant(source: Path, out: Path, truth: Path, share: float, seed: int) -> int:
    """Copy img2dataset shards, and swap the captions of a random share of the pairs among these pairs.

    Args:
        source: folder with tars, Parquet sidecars and stats.
        out: folder for the copy, in the same layout. Tars and Parquet sidecars both have the new captions.
        truth: JSON file to write, with the uids of the swapped pairs.
        share: share of the pairs to swap.
        seed: of the choice of these pairs.

    Returns:
        The number of swapped pairs. A pair that received an equal caption does not count.
    """
    shards = {path: _read(path) for path in sorted(source.glob("*.tar"))}
    pairs = [fields for members in shards.values() for name, fields in _jsons(members)]
    chosen = [pairs[i] for i in permutation(len(pairs), "swap", seed).tolist()[: round(share * len(pairs))]]
    captions = [fields["caption"] for fields in chosen]
    swapped = {
        fields["uid"]: caption
        for fields, caption in zip(chosen, captions[1:] + captions[:1], strict=True)
        if fields["caption"] != caption
    }
    for path, members in shards.items():
        renamed = {name.removesuffix(".json"): swapped.get(fields["uid"]) for name, fields in _jsons(members)}
        storage.write_bytes(str(out / path.name), _tar([(name, _changed(name, data, renamed)) for name, data in members]))
        table = pq.read_table(path.with_suffix(".parquet"))
        new = [
            swapped.get(uid, caption) for uid, caption in zip(*(table[c].to_pylist() for c in ("uid", "caption")), strict=True)
        ]
        table = table.set_column(table.column_names.index("caption"), "caption", [new])
        storage.write_bytes(str(out / path.with_suffix(".parquet").name), tables.parquet_bytes(table))
        stats = path.with_name(f"{path.stem}_stats.json")
        storage.write_bytes(str(out / stats.name), stats.read_bytes())
    storage.write_bytes(str(truth), tables.json_bytes(sorted(swapped)))
    return len(swapped)


def _read(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


def _jsons(members: list[tuple[str, bytes]]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, json.loads(data)) for name, data in members if name.endswith(".json")]


def _changed(name: str, data: bytes, captions: dict[str, str | None]) -> bytes:
    key, _, suffix = name.partition(".")
    caption = captions.get(key)
    if caption is None or suffix not in ("txt", "json"):
        return data
    return caption.encode() if suffix == "txt" else json.dumps(json.loads(data) | {"caption": caption}).encode()


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
