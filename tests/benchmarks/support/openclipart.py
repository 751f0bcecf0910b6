"""Another domain with bad alt text of its own: clip art in the public domain, with the titles and keywords of its authors.

Fetched from Debian (packages openclipart-png and openclipart-svg) by `fetch`, which needs apt-get and dpkg-deb, not root.
"""

import hashlib
import html
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PACKAGES = ("openclipart-png", "openclipart-svg")
PAIRS, IN_A_SHARD = 3328, 832
NO_KEYWORDS = {"unsorted", "clip_art", ""}


def fetch(folder: Path) -> None:
    """Download and unpack both packages below `folder`, unless they are there."""
    if (folder / "usr").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "partial")], check=True)
    (folder / "partial" / "usr").rename(folder / "usr")


def caption(svg: str) -> str:
    """Title and keywords of a drawing, as its author left them; empty where there are none."""
    work = svg.partition("</metadata>")[0]
    title = re.search(r"<dc:title>(.*?)</dc:title>", work, re.DOTALL)
    keywords = re.search(r"<dc:subject>(.*?)</dc:subject>", work, re.DOTALL)
    words = re.findall(r"<rdf:li>(.*?)</rdf:li>", keywords[1], re.DOTALL) if keywords else []
    parts = [title[1] if title else "", *(word for word in words if word.strip() not in NO_KEYWORDS)]
    return " ".join(html.unescape(" ".join(parts)).split())


def chosen(fetched: Path) -> list[tuple[Path, str]]:
    """PAIRS drawings as PNG, chosen by a hash of their name, each with its caption."""
    root = fetched / "usr" / "share" / "openclipart"
    drawings = sorted((root / "png").rglob("*.png"), key=lambda p: hashlib.sha256(p.name.encode()).digest())
    pairs = []
    for png in drawings:
        svg = (root / "svg" / png.relative_to(root / "png")).with_suffix(".svg")
        if svg.is_file() and (text := caption(svg.read_text(errors="replace"))):
            pairs.append((png, text))
        if len(pairs) == PAIRS:
            break
    return pairs


def drawn(folder: Path) -> Iterator[tuple[str, Any]]:
    """Caption and picture of every chosen drawing that is not too large for Pillow's own limit, on white."""
    from PIL import Image

    fetch(folder)
    for png, text in chosen(folder):
        try:
            image = Image.open(png).convert("RGBA")
        except Image.DecompressionBombError:
            continue
        white = Image.new("RGBA", image.size, "white")
        yield text, Image.alpha_composite(white, image).convert("RGB")


def write_shards(fetched: Path, corpus: Path) -> int:
    """Write the chosen drawings as shards in img2dataset's layout; returns how many there are."""
    corpus.mkdir(parents=True, exist_ok=True)
    pairs = chosen(fetched)
    for first in range(0, len(pairs), IN_A_SHARD):
        some = [(png, _meta(first + i, png, text)) for i, (png, text) in enumerate(pairs[first : first + IN_A_SHARD])]
        shard = corpus / f"{first // IN_A_SHARD:05d}"
        with tarfile.open(shard.with_suffix(".tar"), "w", format=tarfile.USTAR_FORMAT) as tar:
            for png, meta in some:
                members = {"png": png.read_bytes(), "txt": meta["caption"].encode(), "json": json.dumps(meta).encode()}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{meta['key']}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        pq.write_table(pa.Table.from_pylist([meta for _, meta in some]), shard.with_suffix(".parquet"))
        Path(f"{shard}_stats.json").write_text(json.dumps({"successes": len(some)}))
    return len(pairs)


def _meta(number: int, png: Path, text: str) -> dict[str, str]:
    return {"uid": hashlib.sha256(png.name.encode()).hexdigest()[:32], "key": f"{number:09d}", "caption": text}
