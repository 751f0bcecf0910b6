"""Does influence predict what training again without pairs does? LDS over 80 real refits, beside what others compute.

    make bench

Single-model influence on the demo corpus (20 % swapped captions), target: eight parts of a fourth artist's drawings.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from ecif.directions import Directions
from ecif.evaluation import auroc, linear_datamodeling_score
from ecif.heads import embed
from ecif.heads.cross_fit import FittedHeads, Refit, removals
from ecif.heads.curvature import gauss_newton_product
from ecif.heads.influence import score
from ecif.permutation import permutation
from ecif.projected.curvature import damped, gauss_newton
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import pca_projection, random_projection
from ecif.projected.sampled import sampled_gauss_newton
from ecif.solve import krylov, largest_eigenvalue_of_matrix
from pipeline import storage
from pipeline.corpus.batches import batches_of
from pipeline.inputs import load_inputs
from pipeline.results.query import OpenIndex
from pipeline.run import run
from pipeline.run_folder import tables, tensors
from pipeline.run_folder.finished import open_run
from pipeline.stages.fit.sample import read_sample
from pipeline.stages.solve.targets import read_target
from pipeline.workers.cluster import session
from tests.benchmarks.support.noisy_demo import SWAPPED, noisy
from tests.benchmarks.support.refits import refitter_of

pytestmark = pytest.mark.benchmark
REFITS = 80
LEFT_OUT = 120
DAMPINGS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A finished demo run, its sample and 80 refits without 30 % of it."""
    folder = tmp_path_factory.mktemp("lds")
    config = noisy(folder, index={})
    run(config)
    loaded, corpus, clean = load_inputs(config)
    sample, question = read_sample(corpus, config), read_target("clean", clean["clean"]).question(config)
    removed = removals(len(sample.fold), REFITS, "benchmark", config.seed)
    with session(None) as resources:
        jobs = [Refit(~without, config.seed) for without in removed]
        refitted = refitter_of(config, resources, loaded.heads, sample)(jobs)
    losses = torch.stack([question.group_losses(path[-1]) for path in refitted])
    return config, sample, question, removed, losses


def in_batches(pairs, config):
    """From the order of a shard's pairs to that of its batches, as the sample has them."""
    return torch.cat(batches_of(config).of(pairs["shard"][0].as_py(), len(pairs)))


def column(table, name, config):
    """A column [N] in the order of the sample."""
    shards = [table.filter(pc.equal(table["shard"], shard)) for shard in sorted(set(table["shard"].to_pylist()))]
    return torch.cat([torch.tensor(shard[name].to_numpy())[in_batches(shard, config)] for shard in shards])


def test_leaving_single_pairs_out(truth):
    """Prints what either order predicts of it, cross-fitted, beside really fitting the heads again without each pair."""
    config, sample, question, _, _ = truth
    second = run(config.model_copy(update={"score": config.score.model_copy(update={"order": 2})})).scores()
    first = run(config).scores()
    everyone = torch.arange(len(sample.fold))
    pairs = permutation(len(sample.fold), "leave one out")[:LEFT_OUT]
    jobs = [Refit(everyone >= 0, config.seed), *(Refit(everyone != pair, config.seed) for pair in pairs)]
    with session(None) as resources:
        refitted = refitter_of(config, resources, load_inputs(config).model.heads, sample)(jobs)
    losses = np.array([question.group_losses(path[-1]).sum().item() for path in refitted])
    change = losses[1:] - losses[0]
    print(f"\n{LEFT_OUT} pairs left out, one at a time; leverage at most {column(second, 'leverage', config)[pairs].max():.2f}")
    for name, table in (("first order", first), ("second order", second)):
        predicted = column(table, "influence_clean", config)[pairs].double().numpy()
        pearson, slope = np.corrcoef(predicted, change)[0, 1], predicted @ change / (change @ change)
        print(f"  {name:14s} Pearson {pearson:.3f}, slope {slope:.2f}")
        assert pearson > 0.7


def test_self_influence_finds_swapped_captions(truth):
    """Prints how well it does, unasked, beside what is computed for every pair."""
    config, *_ = truth
    swapped = json.loads(Path(config.run).with_name(SWAPPED).read_text())
    own = [tables.read_table(item.url) for item in storage.listing(OpenIndex(config.run).self_influence, ".parquet")]
    scores = open_run(config.run).scores()
    found = {name: (scores["uid"], scores[name]) for name in ("held_out_cosine", "held_out_loss", "misalignment")}
    found["self_influence"] = tuple(pa.chunked_array([t[name] for t in own]) for name in ("uid", "self_influence"))
    print("\nAUROC for the swapped captions")
    for name, (uids, values) in found.items():
        badness = torch.from_numpy(values.to_numpy().copy()) * (-1 if name == "held_out_cosine" else 1)
        value = auroc(badness, torch.from_numpy(np.isin(uids.to_pylist(), swapped)))
        print(f"  {value:.3f}  {name}", flush=True)
        assert value > 0.9


def test_influence_predicts_refits_better_than_what_others_compute(truth):
    config, sample, question, removed, losses = truth
    artifacts = open_run(config.run).checkpoints[0].artifacts(config.run)
    path, batches = tensors.load(artifacts.url("heads"), FittedHeads).path, sample.batches()
    images, texts = sample.images.float(), sample.texts.float()

    def at(heads):
        """The sample's pairs and the gradients of the target's parts under some heads."""
        return embed(heads, images, texts), torch.stack([question.gradient(heads, group) for group in question.groups])

    def lds(influence):
        return linear_datamodeling_score(influence, removed, losses)

    exact = tensors.load(artifacts.url("directions/clean"), Directions).groups
    table = {"exact projection, Gauss-Newton, calibrated damping": lds(exact)}
    influence = {name: [] for name in (*DAMPINGS, "none")}  # a run's is the mean over its checkpoints
    for heads in path:
        pairs, gradients = at(heads)
        products = lambda v, heads=heads, pairs=pairs: gauss_newton_product(heads, pairs, batches, v)  # noqa: E731
        spaces = krylov(products, gradients, 24)
        top = spaces.largest_eigenvalue().max()
        for damping in DAMPINGS:
            moved = score(heads, pairs, batches, spaces.solve(torch.full_like(spaces.norm, damping) * top)[0])
            influence[damping].append(moved.positive + moved.negative)
        plain = score(heads, pairs, batches, gradients)
        influence["none"].append(plain.positive + plain.negative)
    for damping in DAMPINGS:
        table[f"exact projection, Gauss-Newton, damping {damping:g}"] = lds(torch.stack(influence[damping]).mean(0))
        table[f"... at the last checkpoint alone, damping {damping:g}"] = lds(influence[damping][-1])
    table["exact projection, no curvature (TracIn)"] = lds(torch.stack(influence["none"]).mean(0))
    heads, (pairs, gradients) = path[-1], at(path[-1])
    index = OpenIndex(config.run)
    answered = [(a, in_batches(a.pairs, config)) for a in index.ask(index.project(gradients))]
    for field in ("influence", "theta_relatif", "loss_relatif", "relative_influence"):
        answers = torch.cat([getattr(a, field)[:, order] for a, order in answered], 1)
        table[f"index, {index.projection.size} numbers, default damping, {field}"] = lds(answers)
    for name, make, ranks in (
        ("random", lambda r: random_projection(heads, r, r, 0), ((16, 16), (32, 32))),
        ("PCA", lambda r: pca_projection(heads, pairs, r, r), ((16, 16), (32, 16), (32, 32), (64, 32))),
    ):
        for rank in ranks:
            projection = make(rank)
            projected = [project_batch(heads, pairs.take(rows), projection) for rows in batches]
            per_pair = torch.empty(len(pairs.u), projection.size)
            for rows, batch in zip(batches, projected, strict=True):
                per_pair[rows] = sum(pair_gradients(batch))
            queries = projection.apply(heads, gradients)
            curvatures = {"Gauss-Newton": sum(gauss_newton(b).double() for b in projected)}
            curvatures["sampled Gauss-Newton"] = sum(
                sampled_gauss_newton(b, f"benchmark {i}").double() for i, b in enumerate(projected)
            )
            curvatures["empirical Fisher"] = (per_pair.T @ per_pair).double()
            for kind, matrix in curvatures.items():
                top = largest_eigenvalue_of_matrix(matrix)
                best = max(lds(damped(matrix, d * top).influence(per_pair, queries)) for d in DAMPINGS)
                table[f"{name} projection, {projection.size} numbers, {kind}, best damping"] = best
    print(f"\nLDS over {REFITS} refits, mean of {losses.shape[1]} parts of the target")
    for name, value in table.items():
        print(f"  {value:.3f}  {name}")
    first = table["exact projection, Gauss-Newton, calibrated damping"]
    whole = linear_datamodeling_score(exact.sum(0, keepdim=True), removed, losses.sum(1, keepdim=True))
    print(f"  {whole:.3f}  ... calibrated, on the whole target's loss")
    others = [value for name, value in table.items() if "exact projection, Gauss-Newton" not in name and "alone" not in name]
    assert first > max(others)
    assert first >= 0.85
