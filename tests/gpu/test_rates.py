"""How fast the stages' functions are on a GPU, and the share of the time in which it computes. `make gpu` prints the table.

On a CPU the same code runs on tiny inputs, which shows no more than that it works.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ecif.columns.agreement import agreement_with
from ecif.columns.bank import build_bank
from ecif.heads import Heads, embed, standardised
from ecif.heads.cross_fit import TOGETHER, FittedHeads
from ecif.heads.fit import Course, fit, fixed_batches
from ecif.heads.influence import score
from ecif.losses import CLIP
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import random_projection
from ecif.sample import Sample
from ecif.slices import LinearSystem, Shared
from ecif.system import LocalSystem
from ecif.towers.precision import computed_in
from pipeline.corpus.pairs import Pair
from pipeline.sections import Model
from pipeline.stages.embed.actor import EmbedPart
from pipeline.stages.embed.rows import Embedded, Part
from pipeline.stages.embed.usage import THREADS
from tests.support.small_models import TINY, write_model

D_IMAGE, D_TEXT, WIDTH, PART = 768, 512, 512, 256  # ViT-B/32
FOLDS, CHECKPOINTS, REPEATS = 5, 2, 4  # of a run by default
WIDE = {"cpu": 512, "cuda": 8192}  # pairs of a shard
SAMPLE = {"cpu": 1024, "cuda": 65_536}
BANK = {"cpu": 512, "cuda": 16_384}
PARTS = {"cpu": {"ViT-B-32": 4, "ViT-L-14": 4}, "cuda": {"ViT-B-32": 60, "ViT-L-14": 15}}
STEPS = {"cpu": 2, "cuda": 24}


def seconds(to: torch.device, work: Callable[[], object]) -> tuple[float, str]:
    """Seconds of the second call, and the share of them in which the GPU computes, in words."""

    def wait() -> None:
        if to.type == "cuda":
            torch.cuda.synchronize()

    work()
    wait()
    started = time.perf_counter()
    work()
    wait()
    took = time.perf_counter() - started
    if to.type != "cuda":
        return took, "no GPU"
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        wait()
    busy = sum(event.self_device_time_total for event in seen.key_averages()) / 1e6
    return took, f"busy {min(1.0, busy / took):.0%}"


def features(pairs: int, to: torch.device) -> tuple[Heads, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(pairs, d, generator=g) for d in (D_IMAGE, D_TEXT))
    heads = Heads(torch.randn(D_IMAGE, WIDTH, generator=g), torch.randn(D_TEXT, WIDTH, generator=g), 100.0)
    unit = (torch.nn.functional.normalize(side, dim=1).to(to) for side in (images, texts))
    return standardised(heads).to(to), *unit


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14"])
def test_an_actor_of_embed_beside_the_bare_forward_pass(to, table, tmp_path: Path, name: str):
    cfg = open_clip.get_model_config(name) if to.type == "cuda" else TINY
    actor = EmbedPart([str(tmp_path)], Model(name=write_model(tmp_path / "model", cfg)), "bf16")
    parts = PARTS[to.type][name]
    side, length = cfg["vision_cfg"]["image_size"], cfg["text_cfg"]["context_length"]
    pixels = np.random.default_rng(0).integers(0, 256, (PART, side, side, 3), np.uint8)
    pairs = [Pair(i, f"{i:09d}", f"{i:032x}", "a caption", pixels[i], f"{i:032x}") for i in range(PART)]
    row = Part(0, "00000", 0, 1, pairs, [], False, None, np.ones((PART, length), np.int32)).to_row()
    part = pa.table({key: [value] for key, value in row.items()})

    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(to)
    tokens, towers = torch.ones(PART, length, dtype=torch.long, device=to), actor.forward.towers

    def bare() -> None:
        with computed_in("bf16", to):
            for _ in range(parts):
                towers.image_features(images)
                towers.token_features(tokens)

    def actors() -> None:
        with ThreadPoolExecutor(THREADS[to.type]) as pool:
            assert sum(Embedded.from_row({"facts": r["facts"][0]}).pairs for r in pool.map(actor, [part] * parts))

    count = PART * parts
    (alone, _), (ours, busy) = seconds(to, bare), seconds(to, actors)
    table.append(
        f"embed {name}: bare forward pass in bf16 {count / alone:,.0f} pairs/s, one actor {count / ours:,.0f} "
        f"({alone / ours:.0%}), {busy}"
    )


@pytest.mark.parametrize("targets", [1, 8])
@pytest.mark.parametrize(("batch", "repeats"), [(256, REPEATS), (1024, 1)])
def test_score(to, table, targets: int, batch: int, repeats: int):
    count = WIDE[to.type]
    heads, images, texts = features(count, to)
    directions = torch.randn(targets, heads.size, generator=torch.Generator().manual_seed(1)).to(to)
    order = [torch.randperm(count, generator=torch.Generator().manual_seed(r)) for r in range(repeats)]
    batches = [rows for repeat in order for rows in repeat.split(batch)]
    took, busy = seconds(to, lambda: score(heads, embed(heads, images, texts), batches, directions))
    table.append(
        f"score, batches of {batch} x {repeats}, {targets} targets, one set of heads: {count / took:,.0f} pairs/s, {busy}"
    )


def test_agreement(to, table):
    count = WIDE[to.type]
    heads, images, texts = features(BANK[to.type], to)
    fold = torch.arange(BANK[to.type], device=to) % FOLDS
    bank, some = build_bank(images, texts, fold, heads), slice(0, count)
    took, busy = seconds(to, lambda: agreement_with(bank, images[some], texts[some], fold[some]))
    table.append(f"agreement with a bank of {BANK[to.type]}: {count / took:,.0f} pairs/s, {busy}")


def test_solve(to, table):
    """The Krylov spaces of one part of a target, for the heads of all folds and checkpoints: `solve` takes four of these."""
    count = SAMPLE[to.type]
    heads, images, texts = features(count, to)
    sample = Sample(images.half().cpu(), texts.half().cpu(), (torch.arange(count) % FOLDS).short(), [256] * (count // 256))
    fitted = FittedHeads([heads] * CHECKPOINTS, [[heads] * CHECKPOINTS] * FOLDS)
    some = slice(0, 512)
    bank = build_bank(images[some], texts[some], sample.fold[some].to(to), heads)
    system = LocalSystem(fitted, Shared(sample, fitted.every(), heads, CLIP, bank), 1)
    systems = [LinearSystem(CHECKPOINTS + f * CHECKPOINTS + c, f) for f in range(FOLDS) for c in range(CHECKPOINTS)]
    vectors = torch.randn(len(systems), heads.size, generator=torch.Generator().manual_seed(1)).to(to)
    took, busy = seconds(to, lambda: system.krylov(systems, vectors, STEPS[to.type]))
    table.append(f"solve, {count} pairs: {STEPS[to.type]} products of {len(systems)} systems {took:.2f} s, {busy}")


@pytest.mark.parametrize("fits", [1, TOGETHER["cuda"]])
def test_fit(to, table, fits: int):
    count = SAMPLE[to.type]
    heads, images, texts = features(count, to)
    batches = list(torch.arange(count).split(256))
    courses = [Course(fixed_batches([rows[seed:] for rows in batches]), seed) for seed in range(fits)]
    took, busy = seconds(to, lambda: fit(heads, images, texts, courses, batch_size=256, epochs=1, learning_rate=1e-4))
    table.append(f"fit, an epoch of {count} pairs, {fits} together: {took:.2f} s, {busy}")


def test_index(to, table):
    count = 256
    heads, images, texts = features(count, to)
    projection = random_projection(heads, (32, 32), (32, 32), 0)

    def gradients() -> None:
        pair_gradients(project_batch(heads, embed(heads, images, texts), projection))

    took, busy = seconds(to, gradients)
    table.append(f"index, 2 x 1024 numbers a pair: {count / took:,.0f} pairs/s, {busy}")
