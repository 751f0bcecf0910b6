"""The files of infra/, and stand-ins for the commands that they call."""

import os
from pathlib import Path

import typer
import yaml

from jobs.cli import app

INFRA = Path(__file__).parents[2] / "infra"
DOCUMENTS = {
    (file, document["kind"]): document
    for file in ("raycluster.yaml", "rayjob.yaml")
    for document in yaml.safe_load_all((INFRA / file).read_text())
}
COMMANDS = typer.main.get_command(app).commands


def parses(words: list[str]) -> bool:
    """Whether the package has such a command, with such options."""
    assert words[0].rpartition("/")[2] == "ecif"
    COMMANDS[words[1]].make_context(words[1], list(words[2:]))
    return True


def executable(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def path_with(folder: Path) -> str:
    """A PATH on which the programs of a folder come first."""
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
