"""docs/architecture.md is a map: what it names is there, and no folder of the code is missing from it."""

import re

from tests.support.markdown import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text()
NAMED = set(re.findall(r"`((?:ecif|pipeline|jobs|tests|docs|infra)/[\w./]*)`", TEXT))


def test_every_file_and_folder_that_it_names_is_there():
    assert len(NAMED) > 40
    assert sorted(name for name in NAMED if not (ROOT / name).exists()) == []
    assert sorted(name for name in NAMED if (ROOT / name).is_dir() and not name.endswith("/")) == []


def test_it_names_every_folder_of_the_code():
    packages = {path.parent for top in ("ecif", "pipeline", "jobs") for path in (ROOT / top).rglob("__init__.py")}
    folders = {f"{path.relative_to(ROOT)}/" for path in packages}
    assert sorted(folders - NAMED) == []
