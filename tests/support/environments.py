"""Python environments of their own, for what the package works with and does not need."""

import subprocess
import sys
import sysconfig
from pathlib import Path


def environment(folder: Path, install: list[str], shared: bool) -> Path:
    """A new environment with what a command installs; gives the folder of its programs.

    Args:
        folder: of the environment.
        install: arguments of pip.
        shared: torch and all that is large are those of the tests' environment. What is installed comes before them.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if shared:
        (packages,) = (folder / "lib").glob("python*/site-packages")
        (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"])
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", *install, "--quiet"], check=True, capture_output=True)
    return folder / "bin"
