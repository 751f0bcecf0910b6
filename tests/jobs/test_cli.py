"""A user's mistake gets one clear line and exit code 2, before any work starts."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from jobs.demo import story
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
        ({"loss": "triplet"}, "loss: no Loss 'triplet': there are clip, "),
        ({"loss": {"name": "triplet"}}, "loss.name: no Loss 'triplet'"),
        ({"loss": {"name": "soft_infonce", "alfa": 0.5}}, "loss.alfa: no such key"),
        ({"loss": {"name": "soft_infonce", "alpha": "much"}}, "loss.alpha: Input should be a valid number"),
        (
            {"loss": {"name": "soft_infonce", "alpha": 2}},
            "loss: SoftInfoNCE(alpha=2.0, beta=1.0, temperature=1.0): needs 0 <= alpha",
        ),
        ({"loss": {"alpha": 0.5}}, "loss.name: this key is required"),
        ({"loss": "mv_infonce"}, "loss: mv_infonce is a loss over several views"),
        (
            {"loss": "dcl", "index": {}},
            "index needs a loss whose curvature has a closed form, as clip's has; this is loss: dcl",
        ),
        ({"loss": "dcl", "score": {"order": 2}}, "score.order: 2 needs a loss whose curvature has a closed form"),
        ({"index": {}, "fit": {"train_logit_scale": True}}, "index needs a fixed logit scale"),
        ({"loss": "dcl", "scoring": {"mode": "forward", "parameters": ["*"]}}, "scoring.mode: forward knows loss: clip"),
        ({"loss": "dcl", "score": {"negative": "taylor"}}, "score.negative: taylor is a form of CLIP's loss"),
        ({"model": GOOD["model"] | {"checkpoints": ["a.pt"]}}, "checkpoint and checkpoints: give one of them"),
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


def test_a_misspelled_key_is_named_before_the_one_that_is_missing_for_it(ecif):
    Path("config.yaml").write_text(yaml.safe_dump({name.replace("corpus", "corpsu"): of for name, of in GOOD.items()}))
    assert ecif("run", "config.yaml")[1] == [
        "ecif: config.yaml: corpsu: no such key (and 1 more); `ecif config` explains every key"
    ]


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ({"name": "ViT-B-32", "checkpoint": "weights.pt"}, "model.checkpoint: no file {here}/weights.pt"),
        ({"name": "ViT-B/32", "checkpoint": "config.yaml"}, "config.yaml is no file of weights (text"),
        ({"name": "ViT-B-32", "checkpoint": "openai"}, "nothing is downloaded"),
        ({"name": "ViT-B-32", "checkpoint": "~"}, "is a folder"),
        (
            {"name": "ViT-B-33", "checkpoint": "config.yaml"},
            "open_clip has no architecture 'ViT-B-33': did you mean ViT-B-32, ",
        ),
        ({"name": "ViT-B-32"}, "needs a checkpoint"),
        ({"name": "hf-hub:laion/CLIP"}, "download it first"),
        ({"name": "local-dir:nowhere"}, "no folder {here}/nowhere"),
    ],
)
def test_a_model_that_cannot_be_had(ecif, model, line, corpus_of_one):
    code, errors, _ = ecif("run", configure(model=model, corpus=corpus_of_one, targets={"clean": corpus_of_one}))
    assert (code, len(errors)) == (2, 1)
    assert line.format(here=Path.cwd()) in errors[0]


def test_model_says_what_was_loaded(ecif, tiny_model):
    code, errors, out = ecif("model", configure(model={"name": tiny_model}))
    assert code == 0
    assert [line.split("  ")[0] for line in out.splitlines()][:3] == ["architecture", "weights", "images"]
    assert len(errors) == 1 and errors[0].startswith("self-check: a right pair does not score above the wrong ones")


@pytest.fixture
def corpus_of_one(tmp_path):
    (tmp_path / "one.tar").write_bytes(bytes(10240))
    return {"shards": str(tmp_path / "one.tar")}


ZERO_SHOT = {"loss": "zero_shot", "classes": "classes.txt"}


@pytest.mark.parametrize(
    ("asked", "classes", "templates", "line"),
    [
        (ZERO_SHOT, None, None, "targets.clean.classes: can't read {here}/classes.txt: no such file"),
        (ZERO_SHOT, b"", None, "targets.clean.classes: {here}/classes.txt is empty"),
        (ZERO_SHOT, b"cat\n", None, "names 1 classes"),
        (ZERO_SHOT, b"cat\n\ndog\n", None, "targets.clean.classes: line 2 of {here}/classes.txt is empty"),
        (ZERO_SHOT, b"caf\xe9\n", None, "{here}/classes.txt is not UTF-8"),
        (ZERO_SHOT | {"templates": "nowhere.txt"}, b"cat\ndog", None, "targets.clean.templates: can't read {here}/nowhere.txt"),
        (
            ZERO_SHOT | {"templates": "t.txt"},
            b"cat\ndog",
            b"one {c}\na photo",
            "templates: line 2 of {here}/t.txt has no {{c}}",
        ),
        ({"loss": "zero_shot"}, None, None, "targets.clean.classes: this key is required"),
        (ZERO_SHOT | {"caption": "text"}, None, None, "leave out caption"),
        ({"classes": "classes.txt"}, None, None, "targets.clean.classes: no such key"),
        ({"margin": 0.3}, None, None, "targets.clean.margin: no such key"),
        ({"loss": "retrieval_margin", "templates": "t.txt"}, None, None, "targets.clean.templates: no such key"),
        ({"loss": "retrieval_margin", "calibrated": True}, None, None, "targets.clean.calibrated: no such key"),
        ({"loss": "retrieval_margin", "margin": 0}, None, None, "targets.clean.margin: Input should be greater than 0"),
        ({"loss": "accuracy"}, None, None, "targets.clean.loss: no TargetLoss 'accuracy': there are contrastive, "),
    ],
)
def test_a_target_that_can_not_be_asked(ecif, corpus_of_one, asked, classes, templates, line):
    for name, data in (("classes.txt", classes), ("t.txt", templates)):
        if data is not None:
            Path(name).write_bytes(data)
    code, errors, _ = ecif("run", configure(corpus=corpus_of_one, targets={"clean": corpus_of_one | asked}))
    assert (code, len(errors)) == (2, 1)
    assert line.format(here=Path.cwd()) in errors[0]


def test_files_that_are_not_there_or_not_yaml(ecif):
    assert ecif("run", "nothing.yaml")[0] == 2
    Path("bad.yaml").write_text("a: [")
    code, errors, _ = ecif("run", "bad.yaml")
    assert (code, len(errors)) == (2, 1)
    code, errors, _ = ecif("select", "nowhere", "--keep", "0.5", "--out", "x.npy")
    assert code == 2
    assert "no finished run" in errors[0]


def test_an_export_format_that_is_not_there(ecif):
    code, errors, _ = ecif("export", "nowhere", "--subset", "s.npy", "--out", "out", "--format", "parquet")
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith("ecif: no Writer 'parquet': there are webdataset")


def test_every_key_is_explained(ecif):
    code, _, text = ecif("config")
    assert code == 0
    for key in ("shards:", "templates:", "batch_size:", "dampings:", "max_pixels:", "epochs:", "rank:"):
        assert key in text
    for kind in ("name: clip", "name: soft_infonce", "loss: contrastive", "loss: retrieval_margin", "loss: zero_shot"):
        assert f"# {kind}  " in text
    for key in ("margin:", "calibrated:", "classes:", "alpha:"):
        assert f" {key}  # " in text
    assert "mv_infonce" not in text
    assert "None (" not in text


def test_targets_are_in_one_order_and_local_paths_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    targets = {"b": {"shards": "b"}, "a": {"shards": ["s3://bucket/a", "a/{0..3}.tar"]}}
    config = Config.model_validate(GOOD | {"targets": targets, "model": {"name": "local-dir:model"}})
    assert list(config.targets) == ["a", "b"]
    assert config.targets["a"].shards == ["s3://bucket/a", f"{tmp_path}/a/{{0..3}}.tar"]
    assert (config.run, config.model.name) == (f"{tmp_path}/run", f"local-dir:{tmp_path}/model")
    assert Config.model_validate(config.model_dump()) == config


def test_versions_are_shown(ecif):
    code, errors, text = ecif("--version")
    assert (code, errors) == (0, [])
    assert re.fullmatch(r"ecif \S+ \(Python \S+, ray \S+, torch \S+, open_clip_torch \S+\)\n", text)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("run", "~/config.yaml"), "ecif: ~/config.yaml: no such file"),
        (("status", "~/run"), "ecif: {home}/run: no run there"),
        (("verify", "~/run"), "ecif: {home}/run: no run there"),
        (("select", "~/run", "--out", "~/s.npy"), "ecif: {home}/run: no finished run there"),
        (("export", "~/run", "--subset", "~/s.npy", "--out", "~/out"), "ecif: {home}/run: no "),
        (("demo", "--out", "~/demo"), "ecif: {home}/demo holds a demo with other settings"),
    ],
)
def test_a_tilde_is_the_home_in_every_argument(ecif, tmp_path, monkeypatch, arguments, line):
    home = tmp_path / "home"
    (home / "demo" / "truth").mkdir(parents=True)
    (home / "demo" / "truth" / "settings.json").write_text("{}")
    monkeypatch.setenv("HOME", str(home))
    code, errors, _ = ecif(*arguments)
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith(line.format(home=home))


def test_a_working_directory_that_is_gone(ecif, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, errors, _ = ecif("status", "run")
    assert (code, errors) == (2, ["ecif: the working directory does not exist any more: change to one that does"])


def test_the_configuration_of_the_demo_works_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story.model, "build_model", lambda folder: f"local-dir:{folder.resolve()}")
    written = story._config(Path("runs/demo"), Path("/embedded"))
    monkeypatch.chdir("/")
    assert Config.from_yaml(tmp_path / "runs" / "demo" / "config.yaml") == written
    assert written.run == f"{tmp_path}/runs/demo/run"


def test_a_configuration_that_is_no_text(ecif):
    Path("config.yaml").write_bytes(b"run: \xff")
    assert ecif("run", "config.yaml")[:2] == (2, ["ecif: config.yaml is not UTF-8 text"])


@pytest.mark.parametrize("command", [("status", "run"), ("verify", "run"), ("retry", "run")])
def test_a_store_that_fails_is_one_line(ecif, command):
    Path("run/started.json").mkdir(parents=True)
    code, errors, _ = ecif(*command)
    assert code == 1
    assert len(errors) == 1
    assert "run/started.json: IsADirectoryError" in errors[0]
