"""What a target is worth as a filter: when it asks about a part of the corpus's concepts, and by the kind of its loss.

    pytest tests/benchmarks/test_coverage.py -m benchmark -s

On the demo corpus with 20 % swapped captions: parts of the target's concepts, drawn one by one or those nearest to one.
"""

import numpy as np
import pytest
import torch

from ecif.evaluation import calibrated_loss, spearman
from ecif.heads.cross_fit import Refit
from ecif.permutation import permutation
from pipeline.config import Config
from pipeline.corpus.shards import find
from pipeline.inputs import as_dataset, load_inputs, made_by
from pipeline.run_folder.artifacts import Artifacts
from pipeline.sections import Pairs
from pipeline.sections import Target as Settings
from pipeline.stages.embed.stage import embed
from pipeline.stages.fit.sample import read_all, read_sample
from pipeline.stages.fit.stage import as_features, choose_how_to_fit, fit_heads, how_to_fit, refitter
from pipeline.stages.solve.stage import solve
from pipeline.stages.solve.targets import TargetFeatures, read_target
from pipeline.workers.cluster import Resources, session
from pipeline.workers.run import Run
from tests.benchmarks.support.noisy_demo import EMBEDDED, noisy

pytestmark = pytest.mark.benchmark
DRAWS = 2
SEEDS = 2
DROPPED = 0.2
PARTS = {"all": 1, "1/2 drawn": 2, "1/2 nearest": 2, "1/4 drawn": 4, "1/4 nearest": 4, "1/8 drawn": 8, "1/8 nearest": 8}
KINDS = {"calibrated": {"calibrated": True}, "retrieval margin": {"loss": "retrieval_margin"}}


def part_of(target: TargetFeatures, name: str, draw: int) -> TargetFeatures:
    """The target's pairs of a part of its concepts."""
    count = len(target.images) // PARTS[name]
    order = permutation(len(target.images), "part", draw).numpy()
    if name.endswith("nearest"):
        texts = target.texts.astype(np.float32)
        order = np.argsort(-texts @ texts[order[0]], kind="stable")
    rows = np.sort(order[:count])
    return target._replace(name=f"{name} {draw}", images=target.images[rows], texts=target.texts[rows])


def run_of(config: Config, resources: Resources, targets: dict[str, Settings]) -> Run:
    """A run that asks these targets about the configuration's corpus."""
    keys = ["heads", "evidence", "misalignment", *(f"directions/{name}" for name in targets)]
    artifacts = Artifacts(config.run, dict.fromkeys(keys, "benchmark"), {})
    return Run(config.model_copy(update={"targets": targets}), resources, artifacts)


def test_a_target_that_covers_little_filters_badly(tmp_path):
    config = noisy(tmp_path)
    loaded, corpus, clean = load_inputs(config)
    pairs = Pairs(shards=str(EMBEDDED / "test"))
    held_out = as_dataset(f"{config.run}/test", pairs, find(pairs.shards, "test"), made_by(loaded, config))
    with session(None) as resources:
        embed([corpus, held_out, *clean.values()], config.model, config.embed, loaded.preprocess, resources)
        sample, target = read_sample(corpus, config), read_target("clean", clean["clean"])
        test = read_all(held_out)
        parts = [part_of(target, name, i) for name in PARTS for i in range(DRAWS)]
        asked = [*parts, *(target._replace(name=kind) for kind in KINDS)]
        asked.append(target._replace(name="test", images=test[0], texts=test[1]))
        settings = dict.fromkeys((one.name for one in asked), config.targets["clean"])
        place = {"shards": config.targets["clean"].shards}
        settings |= {kind: Settings.model_validate(place | KINDS[kind]) for kind in KINDS}
        this = run_of(config, resources, settings)
        how = how_to_fit(config, loaded.heads, choose_how_to_fit(this, loaded.heads, lambda: sample).hyperparameters)
        found = solve(this, how, fit_heads(this, how, lambda: sample), lambda: sample, asked).directions
        influence = torch.stack([found[one.name].influence for one in asked])
        kept = influence > influence.quantile(DROPPED, dim=1, keepdim=True)
        masks = [torch.ones(len(sample.fold), dtype=torch.bool), *kept[:-1]]
        jobs = [Refit(mask, seed, new_batches=True) for mask in masks for seed in range(SEEDS)]
        heads = [path[-1] for path in refitter(resources, how, sample)(jobs)]
    images, texts = (as_features(part, torch.device("cpu")) for part in test)
    losses = torch.tensor([calibrated_loss(h, images, texts) for h in heads]).view(-1, SEEDS).mean(1)
    print(f"\nthe worst {DROPPED:.0%} by influence dropped; test loss without a filter {losses[0]:.2f}")
    gains = {}
    for i, name in enumerate(PARTS):
        rows = range(DRAWS * i, DRAWS * (i + 1))
        covered = np.mean([found[parts[r].name].coverage for r in rows])
        gains[name] = np.mean([(losses[0] - losses[1 + r]).item() for r in rows])
        alike = np.mean([spearman(influence[r], influence[-1]) for r in rows])
        print(f"  {name:12s} coverage {covered:.2f}  gain {gains[name]:5.2f}", end="")
        print(f"  rank correlation with influence on the test {alike:.2f}", flush=True)
    for i, kind in enumerate(KINDS, 1 + len(parts)):
        print(f"  all, {kind:16s}     gain {(losses[0] - losses[i]).item():5.2f}")
    assert gains["all"] > gains["1/8 drawn"]
    assert gains["all"] > gains["1/8 nearest"]
