"""A document points to what there is."""

import re

import pytest

from tests.support.documents import ROOT

DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_links_to_is_there(document):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / document).read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not ((ROOT / document).parent / link).exists()] == []
