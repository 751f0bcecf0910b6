"""What an image costs a reader: `embed.resize: exact` and `fast` beside Pillow alone, in turns on one core.

`pytest tests/benchmarks/test_decode.py -m benchmark -s`
"""

import io
import statistics
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ecif.towers import load, resize_transform
from jobs.demo import model as demo
from pipeline.corpus.images import Resize, read_pixels
from pipeline.sections import Embed

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("one_thread")]
TAR = Path(demo.__file__).parent / "corpus" / "corpus" / "00000.tar"
CLIP = {"size": (224, 224), "mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3, "fill_color": 0}
CLIP |= {"interpolation": "bicubic", "resize_mode": "shortest"}
IMAGES, ROUNDS = 60, 9


def photos(side: int) -> list[bytes]:
    """JPEGs of quality 85 with detail at every scale: the demo's drawings, and noise over them."""
    rng, found = np.random.default_rng(0), []
    with tarfile.open(TAR) as tar:
        drawings = [tar.extractfile(m).read() for m in tar if m.name.endswith(".webp")][:IMAGES]
    for data in drawings:
        drawing = Image.open(io.BytesIO(data)).convert("RGB").resize((side * 4 // 3, side))
        noise = Image.fromarray(rng.integers(256, size=(side, side * 4 // 3, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        Image.blend(drawing, noise.filter(ImageFilter.GaussianBlur(1.2)), 0.35).save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


def with_pillow_alone(resize):
    return lambda data: np.asarray(resize(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("side", [256, 512, 768])
def test_decoding(side):
    data = photos(side)
    exact, fast = (Resize(CLIP, how) for how in ("exact", "fast"))
    ways = {
        "Pillow alone": with_pillow_alone(resize_transform(CLIP)),
        "exact": lambda image: read_pixels(image, Embed(), exact),
        "fast": lambda image: read_pixels(image, Embed(), fast),
    }
    truth = [ways["Pillow alone"](image) for image in data]
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.process_time()
            for image in data:
                way(image)
            took[name].append((time.process_time() - started) / len(data))
    print(f"\n{len(data)} JPEGs with a short side of {side} pixels, {sum(map(len, data)) / len(data) / 1000:.0f} kB each")
    for name, way in ways.items():
        ratio = statistics.median(a / b for a, b in zip(took["Pillow alone"], took[name], strict=True))
        apart = max(int(np.abs(way(image).astype(int) - pixels).max()) for image, pixels in zip(data, truth, strict=True))
        print(f"{name:<13} {1e3 * statistics.median(took[name]):5.2f} ms, {ratio:.2f}x; largest difference {apart} of 255")
    assert all(np.array_equal(ways["exact"](image), pixels) for image, pixels in zip(data, truth, strict=True))


def test_what_fast_does_to_features(tmp_path):
    towers = load(demo.build_model(tmp_path))
    features = []
    for how in ("exact", "fast"):
        pixels = np.stack([read_pixels(image, Embed(), Resize(towers.preprocess, how)) for image in photos(512)])
        features.append(towers.image_features(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()))
    cosines = (features[0] * features[1]).sum(1)
    print(f"\ncosine of a feature to that of open_clip's pixels: mean {cosines.mean():.6f}, smallest {cosines.min():.6f}")
    assert cosines.min() > 0.999
