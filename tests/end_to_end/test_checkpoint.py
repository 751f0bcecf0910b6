"""A checkpoint behind a URL gives the run of the same file on a path, and workers take the driver's bytes and no others."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import storage
from pipeline.errors import RunError
from pipeline.run import run
from pipeline.workers.model import load
from tests.support.run_folders import objects


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """The small model's weights as a compiled and distributed training leaves them."""
    weights = load_file(Path(tiny_model.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    torch.save({"state_dict": {f"module._orig_mod.{key}": value for key, value in weights.items()}}, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_a_checkpoint_behind_a_url(finished, configure, checkpoint, s3, tiny_model, tmp_path):
    storage.write_bytes(f"s3://{s3}/models/last.pt", checkpoint.read_bytes())
    config = configure(tmp_path / "run", model={"name": tiny_model, "checkpoint": f"s3://{s3}/models/last.pt"})
    run(config)
    assert objects(tmp_path / "run", ".parquet", ".safetensors") == objects(finished[0].run, ".parquet", ".safetensors")


def test_workers_refuse_another_file_than_the_driver_loaded(
    configure, checkpoint, local_ray, tiny_model, tmp_path, monkeypatch
):
    def of_another_file(model, named):
        loaded = load(model, named)
        loaded.sha256 = "0" * 64
        return loaded

    monkeypatch.setattr("pipeline.inputs.load", of_another_file)
    with pytest.raises(RunError, match=r"last.pt on \S+ is another file than the driver has"):
        run(configure(tmp_path / "run", model={"name": tiny_model, "checkpoint": str(checkpoint)}))
