"""What do copies of pairs do to the scores? Every pair twice, and wrong pairs with many near-copies, in the demo's corpus.

    pytest tests/benchmarks/test_copies.py -m benchmark -s

A fifth of the captions is swapped. Features are made once, and scored in memory by `ecif.attribute`. For comparison the folds
of single pairs, by a hash of each uid, as if there were no copies.
"""

import io
import tarfile
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

import ecif
from ecif import copies
from ecif.evaluation import auroc
from ecif.heads import Heads
from ecif.permutation import permutation
from ecif.towers import load, resize_transform
from jobs.demo.model import build_model
from tests.benchmarks.support.noisy_demo import EMBEDDED

pytestmark = pytest.mark.benchmark
NOISE, SEEDS, CLOSE = 0.2, 3, 0.02
WRONG, COPIES = 8, 19  # wrong pairs with near-copies, and how many each
BATCH = 32


class Corpus(NamedTuple):
    """Features of the demo's pairs, and of near-copies of some images."""

    images: Tensor  # [N, d_x] float16
    texts: Tensor  # [N, d_t] float16
    captions: list[str]
    shards: list[str]
    copied: Tensor  # [SEEDS, WRONG] rows whose images have near-copies
    near: Tensor  # [SEEDS, WRONG, COPIES, d_x] features of these
    target: ecif.Contrastive
    heads: Heads


class Pairs(NamedTuple):
    """Pairs to score."""

    images: Tensor
    texts: Tensor
    bad: Tensor  # [N] bool: has a caption of another image
    uids: list[str]
    shards: list[str]


def read(name: str) -> list[tuple[Image.Image, str, str]]:
    """Image, caption and shard of each pair of an embedded corpus."""
    found = []
    for path in sorted((EMBEDDED / name).glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for key in (name.removesuffix(".webp") for name in members if name.endswith(".webp")):
            image = Image.open(io.BytesIO(members[f"{key}.webp"])).convert("RGB")
            found.append((image, members[f"{key}.txt"].decode(), path.stem))
    return found


def jittered(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image at another size, cropped by some pixels, brighter or darker, and as a JPEG of some quality."""
    scale = rng.uniform(0.85, 1.15)
    image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC)
    left, top, right, bottom = (int(rng.integers(0, max(1, round(0.04 * image.width)))) for _ in range(4))
    image = image.crop((left, top, image.width - right, image.height - bottom))
    buffer = io.BytesIO()
    ImageEnhance.Brightness(image).enhance(rng.uniform(0.9, 1.1)).save(buffer, "JPEG", quality=int(rng.integers(60, 95)))
    return Image.open(buffer).convert("RGB")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    towers = load(build_model(tmp_path_factory.mktemp("model") / "model"))
    resize = resize_transform(towers.preprocess)

    def images(of: list[Image.Image]) -> Tensor:
        pixels = [torch.from_numpy(np.asarray(resize(image), np.uint8).transpose(2, 0, 1).copy()) for image in of]
        return torch.cat([towers.image_features(torch.stack(pixels[i : i + BATCH])).half() for i in range(0, len(of), BATCH)])

    def texts(of: list[str]) -> Tensor:
        return torch.cat([towers.text_features(of[i : i + BATCH]).half() for i in range(0, len(of), BATCH)])

    pairs, clean = read("corpus"), read("target")
    rng = np.random.default_rng(0)
    copied = torch.tensor(rng.permutation(len(pairs))[: SEEDS * WRONG])
    near = images([jittered(pairs[n][0], rng) for n in copied.tolist() for _ in range(COPIES)])
    target = ecif.Contrastive(images([image for image, _, _ in clean]).float(), texts([text for _, text, _ in clean]).float())
    of_images, captions, shards = (list(part) for part in zip(*pairs, strict=True))
    features = images(of_images), texts(captions)
    return Corpus(
        *features, captions, shards, copied.view(SEEDS, -1), near.view(SEEDS, WRONG, COPIES, -1), target, towers.heads
    )


def swapped(corpus: Corpus, seed: int) -> tuple[Tensor, Tensor]:
    """[N] whose caption each pair has, and [N] bool: whether it is another one than its own."""
    caption, chosen = torch.arange(len(corpus.images)), permutation(len(corpus.images), "swap", seed)
    chosen = chosen[: round(NOISE * len(chosen))]
    caption[chosen] = chosen.roll(-1)
    return caption, torch.tensor([corpus.captions[n] != corpus.captions[m] for n, m in enumerate(caption.tolist())])


def score(corpus: Corpus, pairs: Pairs, seed: int, title: str, kind: Tensor | None = None) -> tuple[float, float]:
    """Expected share of misaligned pairs, and AUROC of `misalignment`; prints those of other columns too.

    Args:
        corpus: the demo's.
        pairs: to score.
        seed: of the method.
        title: to print.
        kind: [N] bool, the bad pairs that are told from the good ones; all by default.
    """
    found = ecif.attribute(
        pairs.images,
        pairs.texts,
        {"clean": corpus.target},
        heads=corpus.heads,
        settings=ecif.Settings(filter=False, seed=seed),
        uids=pairs.uids,
        shards=pairs.shards,
    )
    judged = ~pairs.bad | (pairs.bad if kind is None else kind)
    badness = {"misalignment": found["misalignment"], "held_out_loss": found["held_out_loss"], "agreement": -found["agreement"]}
    of = {name: auroc(values[judged], pairs.bad[judged]) for name, values in badness.items()}
    share = found["misalignment"].mean().item()
    print(f"\n{title}, seed {seed}: share {share:.3f} of {pairs.bad.float().mean():.3f}", end="")
    print("".join(f", AUROC of {name} {value:.3f}" for name, value in of.items()), flush=True)
    return share, of["misalignment"]


def each_once(corpus: Corpus, seed: int) -> Pairs:
    caption, bad = swapped(corpus, seed)
    return Pairs(corpus.images, corpus.texts[caption], bad, [str(n) for n in range(len(bad))], corpus.shards)


def each_twice(corpus: Corpus, seed: int) -> Pairs:
    """Every pair of a shard, then every pair again under another uid."""
    once = each_once(corpus, seed)
    count = len(once.bad)
    order = sorted(range(2 * count), key=lambda n: (once.shards[n % count], n))
    rows = [n % count for n in order]
    uids = [f"{once.uids[n % count]} {n // count}" for n in order]
    return Pairs(once.images[rows], once.texts[rows], once.bad[rows], uids, [once.shards[n] for n in rows])


def with_near_copies(corpus: Corpus, seed: int) -> tuple[Pairs, Tensor]:
    """WRONG more wrong pairs with COPIES near-copies each, in three shards at random; and [N] bool, which these are."""
    caption, bad = swapped(corpus, seed)
    rows = corpus.copied[seed]
    caption[rows], bad[rows] = rows.roll(1), True
    count = len(bad)
    source = torch.cat([torch.arange(count), rows.repeat_interleave(COPIES)])
    order = permutation(len(source), "shards", seed)
    source, images = source[order], torch.cat([corpus.images, corpus.near[seed].flatten(0, 1)])[order]
    shards = [str(3 * i // len(source)) for i in range(len(source))]
    pairs = Pairs(images, corpus.texts[caption][source], bad[source], [str(n) for n in order.tolist()], shards)
    return pairs, torch.isin(source, rows)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_with_every_pair_twice_the_share_and_the_ranking_are_as_with_every_pair_once(corpus, seed):
    once = score(corpus, each_once(corpus, seed), seed, "every pair once")
    twice = score(corpus, each_twice(corpus, seed), seed, "every pair twice")
    assert twice == pytest.approx(once, abs=CLOSE)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_near_copies_of_wrong_pairs_are_found(corpus, seed):
    pairs, near = with_near_copies(corpus, seed)
    assert score(corpus, pairs, seed, "near-copies of wrong pairs", near)[1] > 0.8


def test_without_groups_copies_confirm_each_other(corpus, monkeypatch):
    monkeypatch.setattr(copies, "NEAR", 2.0)
    pairs, near = with_near_copies(corpus, 0)
    assert score(corpus, pairs, 0, "folds by uid, near-copies of wrong pairs", near)[1] < 0.8
    assert score(corpus, each_twice(corpus, 0), 0, "folds by uid, every pair twice")[1] < 0.9
