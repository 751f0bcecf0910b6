"""Drawings of many artists with their names, from icon sets that npm ships, as features of the demo's model.

Each drawing and each caption is embedded once. A corpus is then a choice of drawings and of a caption for each, so that many
corpora with many kinds of noise cost no forward pass.
"""

import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ecif.heads import Heads
from ecif.towers import load
from ecif.towers.split import resize_transform
from jobs.demo.model import build_model

CACHE = Path(__file__).parents[3] / "runs" / "benchmarks"
# At pinned versions: emoji of artists, and illustrations with names of their own.
SETS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3",
    "openmoji": "1.2.29",
    "emojione-v1": "1.2.3",
    "streamline-emojis": "1.2.4",
    "icon-park": "1.2.4",
    "streamline-ultimate-color": "1.2.2",
    "streamline-kameleon-color": "1.2.2",
    "flat-color-icons": "1.2.3",
}
LEFT_OUT = ("skin-tone", "-duo", "flag-for", "flag-")  # near-copies of another drawing by the same artist, and flags
BATCH = 64


class Drawings(NamedTuple):
    """M drawings, each with its name."""

    images: Tensor  # [M, d_x] float16 unit trunk features
    texts: Tensor  # [M, d_t] float16 unit trunk features of the names
    names: list[str]  # the captions
    artists: list[str]  # the set that each is from
    heads: Heads  # the model's own, at random

    def of(self, *artists: str) -> list[int]:
        """Rows of some artists' drawings."""
        return [row for row, artist in enumerate(self.artists) if artist in artists]


def drawings() -> Drawings:
    """All drawings of SETS; embedded once (some minutes) and kept in `runs/benchmarks`."""
    path = CACHE / "drawings.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _embed_all(path)
    with safe_open(path, "pt") as file:
        names, artists = (json.loads(file.metadata()[key]) for key in ("names", "artists"))
        images, texts, image, text = (file.get_tensor(key) for key in ("images", "texts", "image_head", "text_head"))
        return Drawings(images, texts, names, artists, Heads(image, text, float(file.metadata()["logit_scale"])))


def icon_set(name: str) -> dict[str, Any]:
    """The icons of a set, fetched once with `npm pack`, which runs no install scripts."""
    folder = CACHE / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    tarball = folder / f"iconify-json-{name}-{SETS[name]}.tgz"
    if not tarball.exists():
        fetch = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"@iconify-json/{name}@{SETS[name]}"]
        subprocess.run(fetch, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(tarball) as tar:
        return json.load(tar.extractfile("package/icons.json"))


def drawn(name: str) -> Iterator[tuple[str, Any]]:
    """Caption and picture of every drawing of a set that is used, by name."""
    pytest.importorskip("resvg_py")  # of the extra `corpus`
    from jobs.demo.build_corpus import rasterise

    icons = icon_set(name)
    for icon in sorted(icons["icons"]):
        if not icons["icons"][icon].get("hidden") and not any(part in icon for part in LEFT_OUT):
            yield icon.replace("-", " "), rasterise(icons, icon)


def _embed_all(path: Path) -> None:
    towers = load(build_model(CACHE / "model"))
    resize = resize_transform(towers.preprocess)
    features, names, artists, waiting = [], [], [], []

    def embed() -> None:
        pixels = torch.stack([torch.from_numpy(_array(image)) for image in waiting])
        features.append(towers.image_features(pixels).half())
        waiting.clear()

    for artist in SETS:
        for caption, image in drawn(artist):
            names.append(caption)
            artists.append(artist)
            waiting.append(resize(image))
            if len(waiting) == BATCH:
                embed()
    if waiting:
        embed()
    captions = sorted(set(names))
    known = torch.cat([towers.text_features(captions[i : i + BATCH]).half() for i in range(0, len(captions), BATCH)])
    rows = {caption: row for row, caption in enumerate(captions)}
    texts = known[[rows[name] for name in names]]
    heads = {"image_head": towers.heads.image.contiguous(), "text_head": towers.heads.text.contiguous()}
    told = {"names": json.dumps(names), "artists": json.dumps(artists), "logit_scale": str(towers.heads.logit_scale)}
    save_file({"images": torch.cat(features), "texts": texts.contiguous()} | heads, path, metadata=told)


def _array(image: Any) -> Any:
    import numpy as np

    return np.asarray(image).transpose(2, 0, 1).copy()
