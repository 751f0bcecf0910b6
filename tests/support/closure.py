"""The packages that an installation brings, and the pins of the image."""

import re
import sys
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
EXTRAS = ("cluster", "demo")  # that the image installs
HEADER = "# What the image installs, as tests ran it. Written by: python -m tests.support.closure infra/constraints.txt\n"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(extras: tuple[str, ...] = EXTRAS) -> list[str]:
    """What pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]


def closure() -> dict[str, str]:
    """Name and version of everything that the image's installation brings, as the metadata installed here says."""
    found: dict[str, str] = {}
    seen = set()
    todo = [(Requirement(text), frozenset[str]()) for text in requirements()]
    while todo:
        requirement, of = todo.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *of)):
            continue
        name, extras = canonical(requirement.name), frozenset(requirement.extras)
        if (name, extras) not in seen:
            seen.add((name, extras))
            found[name] = version(name)
            todo += [(Requirement(text), extras) for text in distribution(name).requires or []]
    return dict(sorted(found.items()))


def pins() -> dict[str, str]:
    """Name and version of each line of infra/constraints.txt."""
    lines = (ROOT / "infra" / "constraints.txt").read_text().splitlines()
    return {canonical(name): pin for name, pin in (line.split("==") for line in lines if line and not line.startswith("#"))}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(HEADER + "".join(f"{name}=={pin}\n" for name, pin in closure().items()))
