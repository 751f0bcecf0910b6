"""A user's mistake gets one clear line and exit code 2, before any work starts."""

import sys
from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from pipeline.config import Config

GOOD = {
    "run": "run",
    "corpus": {"shards": "corpus"},
    "model": {"name": "ViT-B-32", "checkpoint": "weights.pt"},
    "targets": {"clean": {"shards": "target"}},
}


@pytest.fixture
def ecif(tmp_path, monkeypatch, capsys):
    """Call the command line in an empty folder: its exit code and its lines."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["ecif", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.err.strip().splitlines(), captured.out

    return call


def configure(**changes) -> str:
    Path("config.yaml").write_text(yaml.safe_dump(GOOD | changes))
    return "config.yaml"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"bach_size": 3}, "bach_size: no such key"),
        ({"fit": {"epoch": 3}}, "fit.epoch: no such key"),
        ({"batch_size": "many"}, "batch_size: Input should be a valid integer"),
        ({"targets": {}}, "targets: Dictionary should have at least 1 item"),
        ({"targets": {"positive": {"shards": "target"}}}, "would collide with the influence_positive"),
        ({}, "corpus.shards: no shard or folder {here}/corpus"),
        ({"corpus": {"shards": "data/{00000..00003}.tar"}}, "no shard or folder {here}/data/00000.tar"),
        ({"corpus": {"shards": "*.tar"}}, "corpus.shards: no .tar shards at {here}/*.tar"),
        ({"corpus": {"shards": "a.tar.gz"}}, "compressed tar"),
    ],
)
def test_a_wrong_configuration(ecif, changes, line):
    code, errors, _ = ecif("run", configure(**changes))
    assert code == 2
    assert len(errors) == 1
    assert line.format(here=Path.cwd()) in errors[0]
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ({"name": "ViT-B-33", "checkpoint": "weights.pt"}, "model.checkpoint: no file {here}/weights.pt"),
        ({"name": "ViT-B-33", "checkpoint": "config.yaml"}, "model 'ViT-B-33' can't be loaded"),
        ({"name": "ViT-B-32"}, "needs a checkpoint"),
        ({"name": "hf-hub:laion/CLIP"}, "can't be loaded"),
        ({"name": "local-dir:nowhere"}, "can't be loaded"),
    ],
)
def test_a_model_that_cannot_be_had(ecif, model, line, corpus_of_one):
    code, errors, _ = ecif("run", configure(model=model, corpus=corpus_of_one, targets={"clean": corpus_of_one}))
    assert (code, len(errors)) == (2, 1)
    assert line.format(here=Path.cwd()) in errors[0]


@pytest.fixture
def corpus_of_one(tmp_path):
    (tmp_path / "one.tar").write_bytes(bytes(10240))
    return {"shards": str(tmp_path / "one.tar")}


def test_files_that_are_not_there_or_not_yaml(ecif):
    assert ecif("run", "nothing.yaml")[0] == 2
    Path("bad.yaml").write_text("a: [")
    code, errors, _ = ecif("run", "bad.yaml")
    assert (code, len(errors)) == (2, 1)
    code, errors, _ = ecif("select", "nowhere", "--keep", "0.5", "--out", "x.npy")
    assert code == 2
    assert "no finished run" in errors[0]


def test_every_key_is_explained(ecif):
    code, _, text = ecif("config")
    assert code == 0
    for key in ("shards:", "batch_size:", "dampings:", "max_pixels:", "epochs:"):
        assert key in text
    assert "None (" not in text


def test_targets_are_in_one_order_and_local_paths_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    targets = {"b": {"shards": "b"}, "a": {"shards": ["s3://bucket/a", "a/{0..3}.tar"]}}
    config = Config.model_validate(GOOD | {"targets": targets, "model": {"name": "local-dir:model"}})
    assert list(config.targets) == ["a", "b"]
    assert config.targets["a"].shards == ["s3://bucket/a", f"{tmp_path}/a/{{0..3}}.tar"]
    assert (config.run, config.model.name) == (f"{tmp_path}/run", f"local-dir:{tmp_path}/model")
    assert Config.model_validate(config.model_dump()) == config
