"""What a configuration means where it leaves something open, and what it refuses."""

import os

import fsspec
import pytest
import yaml
from pydantic import ValidationError

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.sections import Filter

NEEDED = {"run": "run", "corpus": {"shards": "a"}, "model": {"name": "m"}, "targets": {"t": {"shards": "b"}}}


@pytest.mark.parametrize(
    ("batch", "told", "repeats"), [(16, None, 4), (256, None, 4), (1000, None, 1), (4096, None, 1), (4096, 3, 3)]
)
def test_large_batches_are_repeated_less_unless_told(batch, told, repeats):
    assert Config.model_validate(NEEDED | {"batch_size": batch, "score": {"repeats": told}}).repeats == repeats


@pytest.mark.parametrize("wrong", [{"seeds": 1}, {"keep": [0.8]}])
def test_a_filter_whose_noise_is_unknown_is_refused_and_so_are_keys_that_are_gone(wrong):
    with pytest.raises(ValidationError):
        Filter.model_validate(wrong)


@pytest.mark.parametrize(("dampings", "refits"), [([0.01, 0.1], 16), ([0.01], 0)])
def test_where_there_is_one_damping_nothing_is_refitted_to_choose_it(dampings, refits):
    assert Config.model_validate(NEEDED | {"solve": {"dampings": dampings}}).solve.calibration_refits == refits


WITH_PATHS = {
    "run": "~/run",
    "corpus": {"shards": ["a", "s3://b/c"], "root": "."},
    "model": {"name": "local-dir:model", "checkpoints": ["w1.pt", "~/w2.pt"]},
    "targets": {"t": {"shards": "../t", "loss": "zero_shot", "classes": "c.txt", "templates": "sub/t.txt"}},
}


def paths(config: Config) -> list[str]:
    target = config.targets["t"]
    return [
        *(config.run, *config.corpus.shards, config.corpus.root, config.model.name, *config.model.checkpoints),
        *(target.shards, target.prompts.classes, target.prompts.templates),
    ]


def test_paths_of_a_file_are_relative_to_its_folder_and_those_from_python_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text(yaml.safe_dump(WITH_PATHS))
    (tmp_path / "link.yaml").symlink_to("configs/a.yaml")
    monkeypatch.setenv("HOME", "/home/her")

    def expected(above, folder):
        own = [f"{folder}/{name}" for name in ("a", "", "model", "w1.pt", "c.txt", "sub/t.txt")]
        a, root, model, weights, classes, templates = own
        home = [a, "s3://b/c", root.rstrip("/"), f"local-dir:{model}", weights, "/home/her/w2.pt"]
        return ["/home/her/run", *home, f"{above}/t", classes, templates]

    for start in ("/", tmp_path, tmp_path / "configs"):
        monkeypatch.chdir(start)
        read = Config.from_yaml(os.path.relpath(tmp_path / "configs" / "a.yaml"))
        assert paths(read) == expected(tmp_path, f"{tmp_path}/configs")
        assert Config.model_validate(read.model_dump()) == read
    assert paths(Config.from_yaml(tmp_path / "link.yaml")) == expected(tmp_path.parent, tmp_path)
    assert paths(Config.model_validate(WITH_PATHS)) == expected(tmp_path, f"{tmp_path}/configs")


def test_a_configuration_at_a_url():
    files = fsspec.filesystem("memory")
    here = {"model": {"name": "local-dir:/model"}, "run": "run"}
    files.pipe_file("/configs/a.yaml", yaml.safe_dump(WITH_PATHS | here).encode())
    read = paths(Config.from_yaml("memory://configs/a.yaml"))
    assert read[:4] == ["memory://configs/run", "memory://configs/a", "s3://b/c", "memory://configs"]
    files.pipe_file("/configs/b.yaml", yaml.safe_dump(WITH_PATHS).encode())
    for url, line in (
        ("memory://configs/b.yaml", "b.yaml: model.name: local-dir:model: a model's folder is on local disk"),
        ("memory://configs/c.yaml", "^memory://configs/c.yaml: no such file$"),
        ("nothing://configs/c.yaml", "^nothing://configs/c.yaml: ValueError: Protocol not known: nothing$"),
    ):
        with pytest.raises(UserError, match=line):
            Config.from_yaml(url)
