"""Does a damping chosen by a few refits come near the best of the grid? Corpora, training lengths, losses and kinds of targets.

    pytest tests/benchmarks/test_damping.py -m benchmark -s

On the demo corpus with 20 % swapped captions. The damping is chosen as a run does, by its default number of refits; all values
of the grid, and no curvature at all, are then judged by other ones.
"""

import io
import tarfile
from pathlib import Path

import pytest
import torch

from ecif.damping import choose_damping
from ecif.evaluation import linear_datamodeling_score
from ecif.heads import embed
from ecif.heads.cross_fit import Refit, removals
from ecif.heads.curvature import gauss_newton_product
from ecif.heads.influence import score
from ecif.solve import krylov
from pipeline.config import Config
from pipeline.inputs import load_inputs
from pipeline.stages.embed.prompts import embed_prompts
from pipeline.stages.embed.stage import embed as embed_shards
from pipeline.stages.fit.sample import read_sample
from pipeline.stages.losses import loss_of
from pipeline.stages.solve.targets import read_target
from pipeline.workers.cluster import session
from tests.benchmarks.support.noisy_demo import EMBEDDED, noisy
from tests.benchmarks.support.refits import refitter_of

pytestmark = pytest.mark.benchmark
JUDGES = 48
SETTINGS = {  # what differs from the demo's configuration
    "the demo's": {},
    "half the corpus": {"fit": {"sample": 1100}},
    "a quarter of the corpus": {"fit": {"sample": 600}},
    "4 epochs": {"fit": {"epochs": 4, "learning_rate": 1e-3, "pull": 0.0}},
    "16 epochs": {"fit": {"epochs": 16, "learning_rate": 1e-3, "pull": 0.0}},
    "siglip": {"loss": "siglip"},
    "dcl": {"loss": "dcl"},
    "soft_infonce": {"loss": "soft_infonce"},
    "calibrated": {"target": {"calibrated": True}},
    "retrieval margin": {"target": {"loss": "retrieval_margin"}},
    "zero-shot": {"target": {"loss": "zero_shot"}},
    "calibrated zero-shot": {"target": {"loss": "zero_shot", "calibrated": True}},
}


def with_classes(pairs: Path, folder: Path) -> dict[str, str]:
    """The images of a set of pairs with a class for each caption: a zero-shot target's settings."""
    folder.mkdir()
    classes: list[str] = []
    with tarfile.open(pairs / "00000.tar") as tar, tarfile.open(folder / "00000.tar", "w") as out:
        for member in tar:
            data = tar.extractfile(member).read()
            if member.name.endswith(".txt"):
                classes.append(data.decode())
                member.name, data = member.name[:-3] + "cls", str(len(classes) - 1).encode()
            if not member.name.endswith(".json"):
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
    (folder / "classes").write_text("\n".join(classes))
    (folder / "templates").write_text("{c}\nan emoji of {c}")
    return {"shards": str(folder / "00000.tar"), "classes": str(folder / "classes"), "templates": str(folder / "templates")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Makes the configuration of a run on the noisy demo corpus, which is embedded once."""
    folder = tmp_path_factory.mktemp("damping")
    base = noisy(folder)
    classified = with_classes(EMBEDDED / "target", folder / "classified")

    def make(changes) -> Config:
        asked = changes.get("target", {})
        changes = {key: value for key, value in changes.items() if key != "target"}
        place = classified if asked.get("loss") == "zero_shot" else {"shards": str(EMBEDDED / "target")}
        return Config.model_validate(base.model_dump() | changes | {"targets": {"clean": place | asked}})

    with session(None) as resources:
        yield make, resources


@pytest.mark.parametrize("name", SETTINGS)
def test_the_chosen_damping_is_near_the_best(demo, name):
    make, resources = demo
    config = make(SETTINGS[name])
    loaded, corpus, clean = load_inputs(config)
    embed_shards([corpus, *clean.values()], config.model, config.embed, loaded.preprocess, resources)
    embed_prompts(list(clean.values()), config.model, config.embed, resources)
    sample, question = read_sample(corpus, config), read_target("clean", clean["clean"]).question(config)
    removed = removals(len(sample.fold), config.solve.refits + JUDGES, "damping", config.seed)
    everything = Refit(torch.ones(len(sample.fold), dtype=torch.bool), config.seed, checkpoints=config.fit.checkpoints)
    refit = refitter_of(config, resources, loaded.heads, sample)
    path, *refitted = refit([everything, *(Refit(~without, config.seed) for without in removed)])
    losses = torch.stack([question.group_losses(heads) for (heads,) in refitted])
    images, texts, batches = sample.images.float(), sample.texts.float(), sample.batches()
    grid, loss = config.solve.dampings, loss_of(config)
    influence = torch.zeros(len(grid) + 1, losses.shape[1], len(sample.fold))  # the last is without curvature
    residuals = [0.0] * len(grid)
    for heads in path:
        pairs = embed(heads, images, texts)
        gradients = torch.stack([question.gradient(heads, group) for group in question.groups])
        products = lambda v, heads=heads, pairs=pairs: gauss_newton_product(heads, pairs, batches, v, loss)  # noqa: E731
        spaces = krylov(products, gradients, config.solve.iterations)
        top = spaces.largest_eigenvalue().max()
        solved = [spaces.solve(torch.full_like(spaces.norm, damping) * top) for damping in grid]
        residuals = [max(old, residual.max().item()) for old, (_, residual) in zip(residuals, solved, strict=True)]
        for i, direction in enumerate([*(q for q, _ in solved), gradients]):
            found = score(heads, pairs, batches, direction, loss)
            influence[i] += (found.positive + found.negative) / len(path)
    few = config.solve.refits
    chosen, _ = choose_damping(influence[:-1], removed[:few], losses[:few], grid, residuals)
    best, lds = choose_damping(influence[:-1], removed[few:], losses[few:], grid, residuals)
    whole, plain = (
        linear_datamodeling_score(influence[i].sum(0, keepdim=True), removed[few:], losses[few:].sum(1, keepdim=True))
        for i in (best, -1)
    )
    of_parts = linear_datamodeling_score(influence[-1], removed[few:], losses[few:])
    print(f"\n{name}: {len(sample.fold)} pairs; LDS over {JUDGES} refits, {losses.shape[1]} parts")
    print("  " + ", ".join(f"{d:g}: {value:.2f}" for d, value in zip(grid, lds, strict=True)), end="")
    print(f"; no curvature: {of_parts:.2f}; of the whole target at the best {whole:.2f}, without curvature {plain:.2f}")
    print(
        f"  chosen by {few} others: {grid[chosen]:g} with {lds[chosen]:.3f}; best {grid[best]:g} with {lds[best]:.3f}",
        flush=True,
    )
    assert lds[chosen] > lds[best] - 0.1
