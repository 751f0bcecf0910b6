"""The scripts of docs/examples do what they say."""

import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import ecif
from tests.support.markdown import ROOT, blocks

EXAMPLES = ROOT / "docs" / "examples"


def load(name: str) -> dict:
    """What a script defines, without running it."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_features_in_memory_are_enough_to_find_wrong_captions(capsys):
    found = load("attribute_features")["main"]()
    assert found["misalignment"] > 0.9
    assert found["misalignment"] > found["held_out_cosine"] > found["clip_score"]
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == list(found)


def test_a_loss_of_one_s_own_changes_the_influence_of_pairs():
    assert 0.3 < load("own_loss")["main"]() < 0.95


@pytest.fixture(scope="module")
def corpus_run(local_ray, tmp_path_factory):
    """The run of run_corpus.py: its folder, and what the script returned."""
    folder, script = tmp_path_factory.mktemp("example"), load("run_corpus")
    return folder, script["main"](script["embedded_emoji"](folder))


def test_a_corpus_is_scored_and_a_subset_of_it_written(corpus_run):
    folder, kept = corpus_run
    assert len(np.load(folder / "run" / "subset.npy")) == kept > 500


def test_the_readme_s_ways_in_run_as_they_stand(corpus_run, monkeypatch):
    random = torch.Generator().manual_seed(0)
    shared = torch.randn(60, 12, generator=random)
    images, texts = (normalize(shared + 0.3 * torch.randn(60, 12, generator=random), dim=1) for _ in range(2))
    heads = ecif.Heads(torch.randn(12, 6, generator=random), torch.randn(12, 6, generator=random), 10.0)
    monkeypatch.setattr(ecif, "load", lambda name, path, tag: SimpleNamespace(heads=heads))
    monkeypatch.chdir(corpus_run[0])  # where config.yaml is
    names = {"images": images[20:], "texts": texts[20:], "coco_images": images[:20], "coco_texts": texts[:20]}
    for block in blocks("README.md", "python"):
        exec(block, names)
    assert sorted(names["worst"].tolist()) == list(range(40))
    assert {"uid", "misalignment"} <= set(names["scores"].column_names)
    assert names["own"]["influence_coco"].isfinite().all()
