"""A finished run of the corpus that exports are tested on."""

import pytest

from tests.support.exports import make_corpus
from tests.support.finished import Run, write_run


@pytest.fixture(scope="package")
def run(tmp_path_factory, local_ray) -> Run:
    folder = tmp_path_factory.mktemp("export")
    return write_run(folder / "run", str(make_corpus(folder / "corpus")))
