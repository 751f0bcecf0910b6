"""The model of a configuration: what is wrong with it is one line, in the words of the user."""

import logging

import pytest

from pipeline import storage
from pipeline.errors import UserError
from pipeline.inputs import load_model
from pipeline.sections import Model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_file_that_was_fetched_is_named_by_its_url(s3, tiny_model):
    url = f"s3://{s3}/inputs/w.pt"
    storage.write_bytes(url, b"<html>Access denied</html>")
    with pytest.raises(UserError) as error:
        load_model(Model(name=tiny_model, checkpoint=url))
    assert str(error.value).startswith(f"{url} is a page of HTML or XML")
    with pytest.raises(UserError, match=rf"model.checkpoint: {url}x: there is no such file"):
        load_model(Model(name=tiny_model, checkpoint=f"{url}x"))


def test_loading_leaves_the_loggers_of_the_process_alone(tiny_model):
    before = list(logging.root.handlers), logging.root.manager.disable
    load_model(Model(name=tiny_model))
    assert (list(logging.root.handlers), logging.root.manager.disable) == before


def test_each_checkpoint_is_loaded_as_the_others():
    model = Model(name="ViT-B-16-SigLIP", checkpoints=["/a.pt", "~/b.pt"], pretrained_cfg="webli", preprocess={"fill_color": 3})
    first, second = model.each()
    assert (first.checkpoint, first.checkpoints, first.pretrained_cfg, first.preprocess.fill_color) == ("/a.pt", [], "webli", 3)
    assert "~" not in second.checkpoint
