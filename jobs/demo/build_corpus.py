"""Rebuild the embedded demo corpus, byte for byte, from five emoji sets published on npm.

The same emoji drawn by five artists give image-text pairs whose influence on one another is easy to judge by eye:
three artists make the training corpus, a fourth the target set and a fifth the test set. The files have the layout
of img2dataset's webdataset output, so the demo reads them exactly as it would a real corpus.

Run from the repository root: python -m jobs.demo.build_corpus [--npm DIR] [--out DIR] [--names N]
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image, features

# The bytes depend on these: the rasteriser, the WebP encoder and (through its "created_by" field) the Parquet writer.
PINNED = {"resvg_py": "0.5.0", "pillow": "13.0.0", "libwebp": "1.6.0", "pyarrow": "26.0.1"}

NAMES = 690
SIZE = 76
# A tar member takes whole 512-byte blocks, so bytes saved inside a block are lost. An image goes into one block if a
# decent quality fits there, otherwise it gets the best quality that fits in two. SIZE is the largest comfortable one
# for which this keeps the whole corpus under 12,000,000 bytes.
BLOCK_QUALITIES = ((512, (75, 65, 55, 45, 35)), (1024, (75, 65, 55, 45, 35, 25)))


@dataclass(frozen=True)
class Artist:
    """An emoji set at a pinned version. The digest is that of icons.json, as npm may repack a tarball but not its contents."""

    name: str
    version: str
    icons_sha256: str

    @property
    def package(self) -> str:
        """The npm package specification."""
        return f"@iconify-json/{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        """The file name `npm pack` gives."""
        return f"iconify-json-{self.name}-{self.version}.tgz"


NOTO = Artist("noto", "1.2.9", "9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6")
NOTO_V1 = Artist("noto-v1", "1.2.5", "ce70d8aa90345cf389875c3571ecd245bd943401822a0c5a0f62336bf8487333")
TWEMOJI = Artist("twemoji", "1.2.5", "5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242")
FLUENT = Artist("fluent-emoji-flat", "1.2.6", "f5f4cf457c0db2ad5a2e42e033e02e0c87d10e43d0164cfffb3bb84914970a63")
EMOJIONE = Artist("emojione", "1.2.3", "e9a865faed523a7c3535b5319ae533d09fac1a62b4e96920eb178bb60e707e80")
DATASETS = {"corpus": (NOTO, NOTO_V1, TWEMOJI), "target": (FLUENT,), "test": (EMOJIONE,)}
ARTISTS = tuple(artist for artists in DATASETS.values() for artist in artists)

SCHEMA = pa.schema(
    [(field, pa.string()) for field in ("uid", "caption", "url", "key", "status", "error_message")]
    + [(field, pa.int32()) for field in ("width", "height", "original_width", "original_height")]
    + [("sha256", pa.string())]
)

IconSet = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One image-text pair: the image member's bytes and the metadata img2dataset would have kept."""

    image: bytes
    meta: dict[str, Any]


def digest(text: str) -> str:
    """SHA-256 in hex. It also replaces a seeded shuffle, because it is the same in every version of every library."""
    return hashlib.sha256(text.encode()).hexdigest()


def shared_names(icon_sets: Iterable[IconSet], count: int) -> list[str]:
    """The first `count` names, in digest order, that every artist drew. Each dataset then shows the same subjects."""
    visible = ({name for name, icon in icons["icons"].items() if not icon.get("hidden")} for icons in icon_sets)
    return sorted(set.intersection(*visible), key=digest)[:count]


def view_box(icons: IconSet, name: str) -> tuple[float, float, float, float]:
    """Left, top, width and height of an icon: its own, or else those of its set, or else Iconify's defaults 0, 0, 16 and 16."""
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    sources = defaults | {field: icons[field] for field in defaults if field in icons} | icons["icons"][name]
    return sources["left"], sources["top"], sources["width"], sources["height"]


def rasterise(icons: IconSet, name: str) -> Image.Image:
    """Draw an icon on a white square. No system fonts: the icons have no text, and fonts vary between machines."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{" ".join(map(str, view_box(icons, name)))}">'
        f"{icons['icons'][name]['body']}</svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def encode(image: Image.Image) -> bytes:
    """Lossy WebP in as few tar blocks as a decent quality allows. If none fits, the lowest quality is taken at any size."""
    data = b""
    for limit, qualities in BLOCK_QUALITIES:
        for quality in qualities:
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=quality, method=6)
            data = buffer.getvalue()
            if len(data) <= limit:
                return data
    return data


def make_pair(artist: Artist, icons: IconSet, name: str, key: str) -> Pair:
    """Render one icon and describe it."""
    image = encode(rasterise(icons, name))
    _, _, width, height = view_box(icons, name)
    meta = {
        "uid": digest(f"{artist.name}/{name}")[:32],
        "caption": name.replace("-", " "),
        "url": f"npm:{artist.package}#{name}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": SIZE,
        "height": SIZE,
        "original_width": round(width),
        "original_height": round(height),
        "sha256": hashlib.sha256(image).hexdigest(),
    }
    return Pair(image, meta)


def make_shards(artists: Iterable[Artist], icon_sets: dict[Artist, IconSet], names: list[str]) -> Iterator[list[Pair]]:
    """A dataset's pairs, the artists mixed, in shards of NAMES pairs with img2dataset's nine-digit keys."""
    drawings = [(artist, name) for artist in artists for name in names]
    # The digest is salted. Otherwise the order would be that of the uids, which would hide a confusion of the two.
    drawings.sort(key=lambda drawing: digest(f"order {drawing[0].name}/{drawing[1]}"))
    for shard, start in enumerate(range(0, len(drawings), NAMES)):
        yield [
            make_pair(artist, icon_sets[artist], name, f"{shard:05d}{index:04d}")
            for index, (artist, name) in enumerate(drawings[start : start + NAMES])
        ]


def tar_bytes(pairs: list[Pair]) -> bytes:
    """The shard's tar. Its bytes are reproducible with USTAR and TarInfo's defaults (no owner, time 0, mode 0644)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for pair in pairs:
            text = json.dumps(pair.meta, separators=(",", ":"))
            members = {"webp": pair.image, "txt": pair.meta["caption"].encode(), "json": text.encode()}
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{pair.meta['key']}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def parquet_bytes(pairs: list[Pair]) -> bytes:
    """The shard's metadata table, one row for each pair. Nearly all values differ, so dictionaries would only add bytes."""
    table = pa.Table.from_pylist([pair.meta for pair in pairs], schema=SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=19, use_dictionary=False)
    return buffer.getvalue()


def stats_bytes(pairs: list[Pair]) -> bytes:
    """The shard's statistics. The times are 0, as real times would make every build differ."""
    counts = {"count": len(pairs), "successes": len(pairs), "failed_to_download": 0, "failed_to_resize": 0}
    times = {"duration": 0, "start_time": 0, "end_time": 0}
    return json.dumps(counts | times | {"status_dict": {"success": len(pairs)}}, indent=4).encode()


def check_versions() -> None:
    """Refuse to build with other encoders than the pinned ones, as the result would not match the committed files."""
    found = {package: version(package) for package in PINNED if package != "libwebp"}
    found["libwebp"] = str(features.version("webp"))
    wrong = [f"{name} {found[name]} (need {needed})" for name, needed in PINNED.items() if found[name] != needed]
    if wrong:
        raise SystemExit(f"build_corpus: the corpus bytes depend on exact versions; found {', '.join(wrong)}")


def download(folder: Path) -> None:
    """Fetch the packages' tarballs; `npm pack` runs no install scripts."""
    packages = [artist.package for artist in ARTISTS]
    subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(folder), *packages], cwd=folder, check=True)


def read_icons(folder: Path, artist: Artist) -> IconSet:
    """Read the one member needed, without unpacking the tarball, and check it before parsing."""
    with tarfile.open(folder / artist.tarball) as tar:
        member = tar.extractfile("package/icons.json")
        data = member.read() if member else b""
    if hashlib.sha256(data).hexdigest() != artist.icons_sha256:
        raise SystemExit(f"build_corpus: icons.json of {artist.package} does not have the pinned sha256")
    icons: IconSet = json.loads(data)
    return icons


def main() -> None:
    """Fetch, build and write. LICENSES.md is written by hand, so it is neither written nor removed here."""
    parser = argparse.ArgumentParser(description="Rebuild the embedded demo corpus.")
    parser.add_argument("--npm", type=Path, help="folder of downloaded tarballs (default: fetch with npm pack)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "corpus", help="folder to write to")
    parser.add_argument("--names", type=int, default=NAMES, help="emoji of each artist (default: %(default)s, all: 1033)")
    args = parser.parse_args()
    check_versions()
    with tempfile.TemporaryDirectory() as temporary:
        if args.npm is None:
            download(Path(temporary))
        icon_sets = {artist: read_icons(args.npm or Path(temporary), artist) for artist in ARTISTS}
    names = shared_names(icon_sets.values(), args.names)
    for dataset, artists in DATASETS.items():
        folder = args.out / dataset
        folder.mkdir(parents=True, exist_ok=True)
        for shard, pairs in enumerate(make_shards(artists, icon_sets, names)):
            (folder / f"{shard:05d}.tar").write_bytes(tar_bytes(pairs))
            (folder / f"{shard:05d}.parquet").write_bytes(parquet_bytes(pairs))
            (folder / f"{shard:05d}_stats.json").write_bytes(stats_bytes(pairs))
            print(f"{dataset}/{shard:05d}: {len(pairs)} pairs")


if __name__ == "__main__":
    main()
