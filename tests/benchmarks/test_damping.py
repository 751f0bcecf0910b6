"""Does a damping chosen by a few refits come near the best of the grid? Corpus sizes, training lengths and kinds of targets.

    pytest tests/benchmarks/test_damping.py -m benchmark -s

On the demo corpus with 20 % swapped captions. The damping is chosen as a run does, by its default number of refits; all values
of the grid are then judged by other ones.
"""

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from ecif.curvature import gauss_newton_product
from ecif.damping import choose_damping
from ecif.heads import embed
from ecif.influence import score
from ecif.solve import krylov
from jobs.demo import model
from jobs.demo.plant import plant
from pipeline.cluster import session
from pipeline.config import Config
from pipeline.embed import embed as embed_shards
from pipeline.fit import Refit, as_features, fit_all, refit_all
from pipeline.inputs import load_inputs
from pipeline.sample import draw
from pipeline.solve import removals
from pipeline.targets import gradient, group_losses, groups, read_targets

pytestmark = pytest.mark.benchmark
JUDGES = 48
CPU = torch.device("cpu")
SETTINGS = {  # what differs from the demo's configuration
    "the demo's": {},
    "half the corpus": {"fit": {"sample": 1100}},
    "a quarter of the corpus": {"fit": {"sample": 600}},
    "4 epochs": {"fit": {"epochs": 4}},
    "16 epochs": {"fit": {"epochs": 16}},
    "retrieval margin": {"target": {"loss": "retrieval_margin"}},
    "calibrated": {"target": {"calibrated": True}},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Makes the configuration of a run on the noisy demo corpus, which is embedded once."""
    folder = tmp_path_factory.mktemp("damping")
    embedded = Path(str(files("jobs.demo") / "corpus"))
    plant(embedded / "corpus", folder / "corpus", folder / "swapped.json", 0.2, 0)
    name = model.build(folder / "model")

    def make(changes) -> Config:
        target = {"shards": str(embedded / "target")} | changes.get("target", {})
        base = {"run": str(folder / "run"), "corpus": {"shards": str(folder / "corpus")}, "model": {"name": name}}
        return Config.model_validate(base | {"targets": {"fluent": target}, "fit": changes.get("fit", {})})

    with session(None) as resources:
        config = make({})
        loaded, corpus, clean = load_inputs(config)
        embed_shards([corpus, *clean.values()], config.model, config.embed, loaded.preprocess, resources)
        yield make, resources


@pytest.mark.parametrize("name", SETTINGS)
def test_the_chosen_damping_is_near_the_best(demo, name):
    make, resources = demo
    config = make(SETTINGS[name])
    loaded, corpus, clean = load_inputs(config)
    sample, (target,) = draw(corpus, config), read_targets(clean, config)
    count = config.solve.refits + JUDGES
    removed = torch.from_numpy(removals(len(sample.fold), count, config, "damping"))
    refitted = refit_all(loaded.heads, sample, [Refit(~r.numpy(), config.seed) for r in removed], config, resources)
    losses = torch.stack([group_losses(heads, target, config) for heads in refitted])
    everything = Refit(torch.ones(len(sample.fold), dtype=torch.bool).numpy(), config.seed)
    (path,) = fit_all(loaded.heads, sample, [everything], config, resources, None, config.fit.checkpoints)
    images, texts = as_features(sample.images, CPU), as_features(sample.texts, CPU)
    batches = [torch.from_numpy(rows) for rows in sample.batches()]
    influence = torch.zeros(len(config.solve.dampings), losses.shape[1], len(sample.fold))
    for heads in path:
        pairs = embed(heads, images, texts)
        gradients = torch.stack([gradient(heads, target, part, config) for part in groups(target, config)])
        products = lambda v, heads=heads, pairs=pairs: gauss_newton_product(heads, [pairs.take(b) for b in batches], v)  # noqa: E731
        spaces = krylov(products, gradients, config.solve.iterations)
        top = spaces.largest_eigenvalue().max()
        for i, damping in enumerate(config.solve.dampings):
            found = score(heads, pairs, batches, spaces.solve(torch.full_like(spaces.norm, damping) * top)[0])
            influence[i] += (found.positive + found.negative) / len(path)
    few = config.solve.refits
    chosen, _ = choose_damping(influence, removed[:few], losses[:few])
    best, lds = choose_damping(influence, removed[few:], losses[few:])
    grid = config.solve.dampings
    print(f"\n{name}: {len(sample.fold)} pairs, {config.fit.epochs} epochs; LDS over {JUDGES} refits")
    print("  " + ", ".join(f"{d:g}: {value:.2f}" for d, value in zip(grid, lds, strict=True)))
    print(
        f"  chosen by {few} others: {grid[chosen]:g} with {lds[chosen]:.3f}; best {grid[best]:g} with {lds[best]:.3f}",
        flush=True,
    )
    assert lds[chosen] > lds[best] - 0.1
