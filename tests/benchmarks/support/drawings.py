"""Drawings of many artists with their names, as features of the demo's model: icon sets that npm ships, and clip art.

Each drawing and each caption is embedded once. A corpus is then a choice of drawings and of a caption for each, so that many
corpora with many kinds of noise cost no forward pass.

    python -m tests.benchmarks.support.drawings      # fetches, draws and embeds them; a quarter of an hour
"""

import json
import subprocess
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
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
from tests.benchmarks.support import openclipart

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
CLIP_ART = "openclipart"  # from Debian, with titles and keywords as their authors left them
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


def drawings(*more: str) -> Drawings:
    """All drawings of SETS, and of more sets after them; embedded once (some minutes) and kept in `runs/benchmarks`."""
    names, artists, images, texts = [], [], [], []
    for artist in (*SETS, *more):
        path = CACHE / "drawings" / f"{artist}.safetensors"
        if not path.exists():
            _embed(artist, path)
        with safe_open(path, "pt") as file:
            of_artist = json.loads(file.metadata()["names"])
            images.append(file.get_tensor("images"))
            texts.append(file.get_tensor("texts"))
        names += of_artist
        artists += [artist] * len(of_artist)
    heads = load(build_model(CACHE / "model")).heads
    return Drawings(torch.cat(images), torch.cat(texts), names, artists, heads)


def pixels(size: int, *more: str) -> Tensor:
    """[M, 3, size, size] uint8: the drawings in the order of `drawings`, drawn once and kept in `runs/benchmarks`."""
    found = []
    for artist in (*SETS, *more):
        path = CACHE / f"pixels-{size}" / f"{artist}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            small = (image.convert("RGB").resize((size, size)) for _, image in drawn(artist))
            save_file({"pixels": torch.stack([torch.from_numpy(_array(image)) for image in small])}, path)
        with safe_open(path, "pt") as file:
            found.append(file.get_tensor("pixels"))
    return torch.cat(found)


def npm_pack(package: str) -> Path:
    """The tarball of a package at a version, `name@version`; fetched once with `npm pack`, which runs no install scripts."""
    folder = CACHE / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    tarball = folder / f"{package.removeprefix('@').replace('/', '-').replace('@', '-')}.tgz"
    if not tarball.exists():
        with TemporaryDirectory(dir=folder) as partial:
            fetch = ["npm", "pack", "--silent", "--pack-destination", partial, package]
            subprocess.run(fetch, cwd=partial, check=True, stdout=subprocess.DEVNULL)
            (Path(partial) / tarball.name).rename(tarball)
    return tarball


def icon_set(name: str) -> dict[str, Any]:
    """The icons of a set."""
    with tarfile.open(npm_pack(f"@iconify-json/{name}@{SETS[name]}")) as tar:
        return json.load(tar.extractfile("package/icons.json"))


def drawn(artist: str) -> Iterator[tuple[str, Any]]:
    """Caption and picture of every drawing of a set that is used, by name."""
    if artist == CLIP_ART:
        yield from openclipart.drawn(CACHE / CLIP_ART)
        return
    pytest.importorskip("resvg_py")  # of the extra `corpus`
    from jobs.demo.build_corpus import rasterise

    icons = icon_set(artist)
    for icon in sorted(icons["icons"]):
        if not icons["icons"][icon].get("hidden") and not any(part in icon for part in LEFT_OUT):
            yield icon.replace("-", " "), rasterise(icons, icon)


def _embed(artist: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    towers = load(build_model(CACHE / "model"))
    resize = resize_transform(towers.preprocess)
    names, features, waiting = [], [], drawn(artist)
    while some := list(islice(waiting, BATCH)):
        names += [caption for caption, _ in some]
        pictures = torch.stack([torch.from_numpy(_array(resize(image))) for _, image in some])
        features.append(towers.image_features(pictures).half())
    captions = sorted(set(names))
    known = torch.cat([towers.text_features(captions[i : i + BATCH]).half() for i in range(0, len(captions), BATCH)])
    rows = {caption: row for row, caption in enumerate(captions)}
    texts = known[[rows[name] for name in names]].contiguous()
    save_file({"images": torch.cat(features), "texts": texts}, path, metadata={"names": json.dumps(names)})


def _array(image: Any) -> Any:
    import numpy as np

    return np.asarray(image).transpose(2, 0, 1).copy()


if __name__ == "__main__":  # fetches and draws everything, before several processes read it
    drawings(CLIP_ART)
    pixels(32)
