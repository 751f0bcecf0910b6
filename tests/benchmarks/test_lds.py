"""Does influence predict what training again without pairs does? LDS over 80 real refits, beside what others compute.

    make bench

Single-model influence on the demo corpus (20 % swapped captions), target: eight parts of a fourth artist's drawings.
"""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from ecif.curvature import gauss_newton_product, loss_gradient
from ecif.evaluation import linear_datamodeling_score
from ecif.heads import embed
from ecif.influence import score
from ecif.projection import pca_projection, random_projection
from ecif.sketch import damped, gauss_newton, pair_gradients, project_batch
from ecif.solve import krylov
from jobs.demo import model
from jobs.demo.plant import plant
from pipeline.cluster import session
from pipeline.config import Config
from pipeline.fit import Refit, as_features, read_heads, refit_all
from pipeline.inputs import load_inputs
from pipeline.run import load_run, run
from pipeline.sample import draw, read_all
from pipeline.solve import Target, group_losses, groups, read_directions, removals

pytestmark = pytest.mark.benchmark
REFITS = 80
DAMPINGS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A finished demo run, its sample and 80 refits without 30 % of it."""
    folder = tmp_path_factory.mktemp("lds")
    embedded = Path(str(files("jobs.demo") / "corpus"))
    plant(embedded / "corpus", folder / "corpus", folder / "swapped.json", 0.2, 0)
    assert len(json.loads((folder / "swapped.json").read_text())) > 400
    config = Config.model_validate(
        {
            "run": str(folder / "run"),
            "corpus": {"shards": str(folder / "corpus")},
            "model": {"name": model.build(folder / "model")},
            "targets": {"fluent": {"shards": str(embedded / "target")}},
        }
    )
    run(config)
    loaded, corpus, clean = load_inputs(config)
    sample, target = draw(corpus, config), Target("fluent", *read_all(clean["fluent"]))
    removed = torch.from_numpy(removals(len(sample.fold), REFITS, config, "benchmark"))
    with session(None) as resources:
        jobs = [Refit(~r.numpy(), config.seed) for r in removed]
        refitted = refit_all(loaded.heads, sample, jobs, config, resources)
    losses = torch.stack([group_losses(heads, target, config) for heads in refitted])
    return config, sample, target, removed, losses


def test_influence_predicts_refits_better_than_what_others_compute(truth):
    config, sample, target, removed, losses = truth
    facts = load_run(config.run)
    heads = read_heads(f"{config.run}/heads/{facts['heads']}.safetensors").full
    pairs = embed(heads, as_features(sample.images, CPU), as_features(sample.texts, CPU))
    batches = [torch.from_numpy(rows) for rows in sample.batches()]
    images, texts = as_features(target.images, CPU), as_features(target.texts, CPU)
    gradients = torch.stack(
        [loss_gradient(heads, [embed(heads, images[rows], texts[rows]) for rows in part]) for part in groups(target, config)]
    )

    def lds(influence):
        return linear_datamodeling_score(influence, removed, losses)

    exact = read_directions(f"{config.run}/directions/{facts['directions']}.safetensors").calibration
    table = {"exact projection, Gauss-Newton, calibrated damping": lds(exact)}
    spaces = krylov(lambda v: gauss_newton_product(heads, [pairs.take(rows) for rows in batches], v), gradients, 24)
    top = spaces.largest_eigenvalue().max()
    for damping in DAMPINGS:
        moved = score(heads, pairs, batches, spaces.solve(torch.full_like(spaces.norm, damping) * top)[0])
        table[f"exact projection, Gauss-Newton, damping {damping:g}"] = lds(moved.positive + moved.negative)
    plain = score(heads, pairs, batches, gradients)
    table["exact projection, no curvature (TracIn)"] = lds(plain.positive + plain.negative)
    for name, make in (
        ("random", lambda r: random_projection(heads, r, r, 0)),
        ("PCA", lambda r: pca_projection(heads, pairs, r, r)),
    ):
        for rank in ((16, 16), (32, 32)):
            projection = make(rank)
            projected = [project_batch(heads, pairs.take(rows), projection) for rows in batches]
            per_pair = torch.empty(len(pairs.u), projection.size)
            for rows, batch in zip(batches, projected, strict=True):
                per_pair[rows] = sum(pair_gradients(batch))
            queries = projection.apply(heads, gradients)
            curvatures = {"Gauss-Newton": sum(gauss_newton(b).double() for b in projected)}
            curvatures["empirical Fisher"] = (per_pair.T @ per_pair).double()
            for kind, matrix in curvatures.items():
                top = torch.linalg.eigvalsh(matrix)[-1].item()
                best = max(lds(damped(matrix, d * top).influence(per_pair, queries)) for d in DAMPINGS)
                table[f"{name} projection, {projection.size} numbers, {kind}, best damping"] = best
    print(f"\nLDS over {REFITS} refits, mean of {losses.shape[1]} parts of the target")
    for name, value in table.items():
        print(f"  {value:.3f}  {name}")
    first = table["exact projection, Gauss-Newton, calibrated damping"]
    whole = linear_datamodeling_score(exact.sum(0, keepdim=True), removed, losses.sum(1, keepdim=True))
    print(f"  {whole:.3f}  ... calibrated, on the whole target's loss")
    others = [value for name, value in table.items() if "exact projection, Gauss-Newton" not in name]
    assert first > max(others)
