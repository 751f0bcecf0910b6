"""A picture of a run's result: the pairs with the highest and the lowest scores."""

import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyarrow as pa
from PIL import Image

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus import shards
from pipeline.corpus.captions import caption_of
from pipeline.corpus.pairs import image_bytes
from pipeline.corpus.tar import Contents, read_groups
from pipeline.sections import Pairs

PER_ROW = 8


def draw(table: pa.Table, corpus: Pairs, config: Config, target: str, out: Path) -> None:
    """Write a PNG of the most misaligned, the most harmful and the most helpful pairs with their captions and scores."""
    rows = [
        ("most misaligned", "misalignment", "descending"),
        ("most harmful to the target", f"influence_{target}", "ascending"),
        ("most helpful to the target", f"influence_{target}", "descending"),
    ]
    picked = [table.sort_by([(column, order), ("uid", "ascending")]).slice(0, PER_ROW).to_pylist() for _, column, order in rows]
    images = _load({(p["shard"], p["index"]) for pairs in picked for p in pairs}, corpus, config)
    figure, axes = plt.subplots(len(rows), PER_ROW, figsize=(1.4 * PER_ROW, 2 * len(rows)), dpi=110)
    for (title, column, _), pairs, line in zip(rows, picked, axes, strict=True):
        for pair, axis in zip(pairs, line, strict=True):
            image, caption = images[pair["shard"], pair["index"]]
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel("\n".join(textwrap.wrap(caption, 16)[:3]) + f"\n{pair[column]:+.2f}", fontsize=8)
        line[0].set_title(f"{title} ({column})", loc="left", fontsize=10, fontweight="bold")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.1, wspace=0.15, hspace=0.6)
    figure.savefig(out, metadata={"Software": None})
    plt.close(figure)


def _load(wanted: set[tuple[str, int]], corpus: Pairs, config: Config) -> dict[tuple[str, int], tuple[Any, str]]:
    """Images and captions of some pairs, by shard and index."""
    found = {}
    for shard in shards.find(corpus.shards):
        mine = {index for name, index in wanted if name == shard.name}
        if not mine:
            continue
        with storage.local_copy(shard.source) as file:
            for group in read_groups(file, Contents()):
                if group.index in mine:
                    image = Image.open(io.BytesIO(image_bytes(file, group, config.embed))).convert("RGB")
                    found[shard.name, group.index] = (image, caption_of(file, group, corpus.reading, config.embed))
    return found
