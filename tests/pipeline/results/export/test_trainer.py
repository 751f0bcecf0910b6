"""The command that an export prints trains open_clip's own trainer, in an environment of its own as the command says."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from pipeline.results.export import export
from tests.support.environments import environment
from tests.support.exports import SELECTED, write_selected

pytestmark = [pytest.mark.slow, pytest.mark.network]
TIMEOUT_S = 300  # a trainer whose loader finds no sample waits for ever
TRAINED = f"Train Epoch: 0 [{SELECTED.total()}/{SELECTED.total()} (100%)]"


def train(usage: str, model: str, folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    """Run the printed command for one epoch with a small model.

    Args:
        usage: what the export printed.
        model: in the place of the run's, which is nowhere.
        folder: where to.
        path: the PATH of the command.
    """
    _, command = usage.splitlines()
    more = f" --model {shlex.quote(model)} --epochs 1 --logs {shlex.quote(str(folder / 'logs'))}"
    given = os.environ | {"PATH": path}
    return subprocess.run(
        command + more, shell=True, env=given, cwd=folder, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Path:
    """The programs of an environment that the printed command has installed, with the tests' torch."""
    from pipeline.results.export.webdataset import TRAINER

    return environment(tmp_path_factory.mktemp("trainer"), ["install", TRAINER], shared=True)


def test_the_printed_command_trains(run, tmp_path, trainer, tiny_model):
    done = export(run.folder, write_selected(run, tmp_path, SELECTED), str(tmp_path / "my export"))
    trained = train(done.usage, tiny_model, tmp_path, f"{trainer}:{os.environ['PATH']}")
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert TRAINED in trained.stderr


def test_the_printed_command_trains_from_s3(run, tmp_path, trainer, tiny_model, s3):
    aws = environment(tmp_path / "aws", ["install", "awscli"], shared=False)
    done = export(run.folder, write_selected(run, tmp_path, SELECTED), f"s3://{s3}/my export/")
    trained = train(done.usage, tiny_model, tmp_path, f"{trainer}:{aws}:{os.environ['PATH']}")
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert TRAINED in trained.stderr
