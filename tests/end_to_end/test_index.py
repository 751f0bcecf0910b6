"""The promises of the index, kept on real pairs with a small model."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from ecif.heads import embed
from ecif.heads.curvature import gauss_newton_product, loss_gradient
from ecif.heads.influence import score
from pipeline import storage
from pipeline.corpus.batches import batches_of
from pipeline.errors import RunError, UserError
from pipeline.inputs import load_inputs
from pipeline.results.query import OpenIndex
from pipeline.run import run
from pipeline.run_folder import tables, tensors
from pipeline.run_folder.finished import open_run
from pipeline.stages.fit.sample import read_all, read_sample
from pipeline.stages.fit.stage import as_features
from pipeline.stages.index import IndexCurvature
from tests.support.run_folders import objects, violations

SMALL = {"rank": [8, 6], "damping": 0.05}
CPU = torch.device("cpu")


def question(config, index):
    """The target's loss in one batch: its features, and its gradient [1, P] under the index's heads."""
    features = [as_features(part, CPU) for part in read_all(load_inputs(config).targets["clean"])]
    return features, loss_gradient(index.heads, [embed(index.heads, *features)])[None]


def in_batches(pairs, config):
    """From the order of a shard's pairs to that of its batches."""
    return torch.cat(batches_of(config).of(pairs["shard"][0].as_py(), len(pairs)))


@pytest.fixture(scope="module")
def indexed(finished, configure, tmp_path_factory):
    """The finished run with an index added: its configuration."""
    folder = tmp_path_factory.mktemp("indexed")
    shutil.copytree(finished[0].run, folder, dirs_exist_ok=True)
    config = configure(folder, index=SMALL)
    run(config)
    return config


@pytest.fixture(scope="module")
def whole(indexed, configure, tmp_path_factory):
    """The same with an index that keeps every number of both heads."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(indexed.run, folder, dirs_exist_ok=True)
    config = configure(folder, index={"rank": [999, 999], "damping": 0.05})
    run(config)
    return config


def test_verify_knows_the_index(indexed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(indexed.run, run)
    assert violations(run) == []
    (cut,) = run.glob("index/*/00000.*.curvature.safetensors")
    cut.write_bytes(cut.read_bytes()[:-1])
    for name in ("self_influence/*/00001.*.parquet", "index/*/00002.*.parquet", "index_curvature/*.safetensors"):
        (gone,) = run.glob(name)
        gone.unlink()
    names = ["index/00000.curvature.safetensors", "index/00002.parquet", "index_curvature.safetensors"]
    found = dict(violations(run))
    assert sorted(found) == [*names, "self_influence/00001.parquet"]
    assert "can't be read" in found.pop(names[0])
    assert set(found.values()) == {"is missing"}


@pytest.mark.slow
def test_the_index_has_the_same_bytes_with_another_number_of_workers(indexed, finished, configure, tmp_path):
    truth = objects(indexed.run, ".parquet", ".safetensors")
    kinds = Counter(name.partition("/")[0] for name in truth)
    assert [kinds[name] for name in ("index", "index_projection", "index_curvature", "self_influence")] == [3 + 3, 1, 1, 3]
    shutil.copytree(finished[0].run, tmp_path, dirs_exist_ok=True)
    run(configure(tmp_path, index=SMALL, workers=2))
    assert objects(tmp_path, ".parquet", ".safetensors") == truth


def test_what_an_interruption_left_undone_is_indexed(indexed, configure, tmp_path):
    truth = objects(indexed.run, ".parquet", ".safetensors")
    shutil.copytree(indexed.run, tmp_path, dirs_exist_ok=True)
    lost = [name for name in truth if name.startswith(("index", "self_influence")) and "00001" in name]
    lost += [name for name in truth if name.startswith("index_curvature/")]
    assert len(lost) == 4
    for name in lost:
        (tmp_path / name).unlink()
    kept = {item.url: item.etag for item in storage.listing(str(tmp_path), ".parquet") if "/00002." in item.url}
    run(configure(tmp_path, index=SMALL))
    assert objects(tmp_path, ".parquet", ".safetensors") == truth
    assert kept.items() <= {item.url: item.etag for item in storage.listing(str(tmp_path), ".parquet")}.items()


def test_another_damping_keeps_the_gradients_and_another_projection_does_not(indexed, configure, tmp_path):
    shutil.copytree(indexed.run, tmp_path, dirs_exist_ok=True)
    before = objects(tmp_path, ".parquet", ".safetensors")
    second = run(configure(tmp_path, index=SMALL | {"damping": 0.2})).finished
    damped = objects(tmp_path, ".parquet", ".safetensors")
    assert {name.split("/")[0] for name in damped.keys() - before.keys()} == {"self_influence"}
    third = run(configure(tmp_path, index=SMALL | {"projection": "random"})).finished
    projected = objects(tmp_path, ".parquet", ".safetensors")
    new = {name.split("/")[0] for name in projected.keys() - damped.keys()}
    assert new == {"index", "index_projection", "index_curvature", "self_influence"}
    assert {name: data for name, data in projected.items() if name in before} == before
    assert len({found.id for found in (open_run(indexed.run), second, third)}) == 1


def test_self_influence_is_the_diagonal_of_the_pairwise_influence(indexed):
    index = OpenIndex(indexed.run)
    shards = [item.url for item in storage.listing(index.gradients, ".parquet")]
    gradients = [torch.from_numpy(sum(tables.read_gradients(tables.read_table(url)))) for url in shards]
    own = [tables.read_table(url.replace(index.gradients, index.self_influence)) for url in shards]
    answers = list(index.ask(torch.cat(gradients)))
    pairwise = torch.cat([a.influence for a in answers], 1)
    assert torch.allclose(pairwise, pairwise.T, rtol=1e-4, atol=1e-6 * pairwise.max())
    expected = torch.from_numpy(np.concatenate([table["self_influence"].to_numpy() for table in own]))
    torch.testing.assert_close(pairwise.diagonal(), expected, rtol=1e-5, atol=0.0)
    assert [t["uid"] for t in own] == [a.pairs["uid"] for a in answers]


def test_an_index_of_all_dimensions_answers_as_the_exact_projection_does(whole):
    index = OpenIndex(whole.run)
    assert index.projection.size == index.heads.size
    (images, texts), gradient = question(whole, index)
    query = index.query(images, texts, [torch.arange(len(images))])
    torch.testing.assert_close(query, index.project(gradient)[0])
    answers = list(index.ask(query[None]))
    sample = read_sample(load_inputs(whole).corpus, whole)  # all pairs, batch after batch
    pairs, batches = embed(index.heads, sample.images.float(), sample.texts.float()), sample.batches()
    explicit = gauss_newton_product(index.heads, pairs, batches, torch.eye(index.heads.size)).double()
    damping = 0.05 * torch.linalg.eigvalsh(explicit)[-1]
    q = torch.linalg.solve(explicit + damping * torch.eye(len(explicit)), gradient[0].double())
    truth = score(index.heads, pairs, batches, q.float()[None])
    for part in ("positive", "negative"):
        mine = torch.cat([getattr(a, part)[0][in_batches(a.pairs, whole)] for a in answers])
        exact = getattr(truth, part)[0].double()
        assert (mine - exact).norm() < 2e-3 * exact.norm()  # fp16 keeps 11 bits


def test_relative_influence_is_bounded_by_the_query_and_reaches_at_least_theta_relatif(indexed):
    index = OpenIndex(indexed.run)
    _, gradient = question(indexed, index)
    query = index.project(gradient)
    for answers in index.ask(torch.cat([query, -2 * query])):
        relative = answers.relative_influence
        assert (relative.abs() <= query.norm() * torch.tensor([[1.0], [2.0]]) * 1.001).all()
        assert (relative.abs() >= answers.theta_relatif.abs() * (1 - 1e-6)).all()
        torch.testing.assert_close(relative[1], -2 * relative[0])
        assert torch.equal(answers.influence.sign(), answers.loss_relatif.sign())


def test_a_curvature_that_is_not_positive_definite_says_what_to_do(whole):
    # The batches' rows and columns span less than all 1792 numbers of both heads.
    artifacts = open_run(whole.run).checkpoints[0].artifacts(whole.run)
    curvature = tensors.load(artifacts.url("index_curvature"), IndexCurvature)
    with pytest.raises(RunError, match=r"index.damping 1e-300: .* not positive definite: raise the damping"):
        curvature.damped(1e-300)


def test_a_run_without_an_index_says_how_to_get_one(finished):
    with pytest.raises(UserError, match=r"has no index: add `index: \{\}`"):
        OpenIndex(finished[0].run)
