"""What a target is worth as a filter: when it asks about a part of the corpus's concepts, and by the kind of its loss.

    pytest tests/benchmarks/test_coverage.py -m benchmark -s

On the demo corpus with 20 % swapped captions: parts of the target's concepts, drawn one by one or those nearest to one.
"""

import numpy as np
import pytest
import torch

from ecif.evaluation import calibrated_loss, spearman
from pipeline.config import Pairs
from pipeline.config import Target as Settings
from pipeline.corpus.batches import permutation
from pipeline.corpus.shards import find
from pipeline.inputs import as_dataset, load_inputs
from pipeline.stages.embed.stage import embed
from pipeline.stages.fit.sample import draw, read_all
from pipeline.stages.fit.stage import Refit, as_features, fit_heads, refit_all
from pipeline.stages.solve.stage import solve
from pipeline.stages.solve.targets import Target, read_targets
from pipeline.workers.cluster import session
from tests.benchmarks.support.noisy_demo import EMBEDDED, noisy

pytestmark = pytest.mark.benchmark
DRAWS = 2
SEEDS = 2
DROPPED = 0.2
PARTS = {"all": 1, "1/2 drawn": 2, "1/2 nearest": 2, "1/4 drawn": 4, "1/4 nearest": 4, "1/8 drawn": 8, "1/8 nearest": 8}
KINDS = {"calibrated": {"calibrated": True}, "retrieval margin": {"loss": "retrieval_margin"}}


def part_of(target: Target, name: str, draw: int) -> Target:
    """The target's pairs of a part of its concepts."""
    count = len(target.images) // PARTS[name]
    order = permutation(len(target.images), "part", draw)
    if name.endswith("nearest"):
        texts = target.texts.astype(np.float32)
        order = np.argsort(-texts @ texts[order[0]], kind="stable")
    rows = np.sort(order[:count])
    return target._replace(name=f"{name} {draw}", images=target.images[rows], texts=target.texts[rows])


def test_a_target_that_covers_little_filters_badly(tmp_path):
    config = noisy(tmp_path)
    loaded, corpus, clean = load_inputs(config)
    pairs = Pairs(shards=str(EMBEDDED / "test"))
    held_out = as_dataset(f"{config.run}/test", pairs, find(pairs.shards, "test"), config, loaded)
    with session(None) as resources:
        embed([corpus, held_out, *clean.values()], config.model, config.embed, loaded.preprocess, resources)
        sample, (target,) = draw(corpus, config), read_targets(clean, config)
        fitted = fit_heads(f"{config.run}/heads.safetensors", loaded.heads, sample, config, resources)
        test = read_all(held_out)
        parts = [part_of(target, name, i) for name in PARTS for i in range(DRAWS)]
        place = {"shards": target.settings.shards}
        kinds = [target._replace(name=kind, settings=Settings.model_validate(place | KINDS[kind])) for kind in KINDS]
        asked = [*parts, *kinds, target._replace(name="test", images=test[0], texts=test[1])]
        found = solve(f"{config.run}/directions.safetensors", loaded.heads, fitted, sample, asked, config, resources)
        influence = found.sample.influence.sum(1)
        kept = influence > influence.quantile(DROPPED, dim=1, keepdim=True)
        masks = [np.ones(len(sample.fold), bool), *kept[:-1].numpy()]
        jobs = [Refit(mask, seed, new_batches=True) for mask in masks for seed in range(SEEDS)]
        heads = refit_all(loaded.heads, sample, jobs, config, resources)
    images, texts = (as_features(part, torch.device("cpu")) for part in test)
    losses = torch.tensor([calibrated_loss(h, images, texts) for h in heads]).view(-1, SEEDS).mean(1)
    print(f"\nthe worst {DROPPED:.0%} by influence dropped; test loss without a filter {losses[0]:.2f}")
    gains = {}
    for i, name in enumerate(PARTS):
        rows = range(DRAWS * i, DRAWS * (i + 1))
        covered = np.mean([found.facts[parts[r].name]["coverage"] for r in rows])
        gains[name] = np.mean([(losses[0] - losses[1 + r]).item() for r in rows])
        alike = np.mean([spearman(influence[r], influence[-1]) for r in rows])
        print(f"  {name:12s} coverage {covered:.2f}  gain {gains[name]:5.2f}", end="")
        print(f"  rank correlation with influence on the test {alike:.2f}", flush=True)
    for i, kind in enumerate(KINDS, 1 + len(parts)):
        print(f"  all, {kind:16s}     gain {(losses[0] - losses[i]).item():5.2f}")
    assert gains["all"] > gains["1/8 drawn"]
    assert gains["all"] > gains["1/8 nearest"]
