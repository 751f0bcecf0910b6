"""What the pages name is there: files, tests, functions, configuration keys, and places that links lead to."""

import re
from importlib import import_module
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from pipeline.config import Config
from tests.support.markdown import FENCE, ROOT, prose, quoted, read

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
OURS = ("README.md", "Makefile", "docs/", "ecif/", "infra/", "jobs/", "pipeline/", "tests/")  # what a path begins with
METADATA = {"ecif.run", "ecif.shard", "ecif.version"}  # keys of a table's schema, which tests/docs/test_tables.py has
SECTIONS = ("corpus", "model", "embed", "fit", "solve", "score", "filter", "index", "scoring", "nightly")

pages = pytest.mark.parametrize("page", PAGES)


def spans(page: str) -> list[str]:
    """What the prose of a page has between backticks, on one line each."""
    return [" ".join(span.split()) for span in quoted(prose(page))]


@pages
def test_commands_name_tests_that_are_there(page):
    commands = [span for span in spans(page) if span.startswith("pytest")]
    for command in commands:
        (path,) = re.findall(r"\S+\.py", command)
        source = (ROOT / path).read_text()
        if wanted := re.search(r"-k (\"[^\"]+\"|\S+)", command):
            words = set(re.findall(r"\w+", wanted[1])) - {"and", "or", "not"}
            assert all(word in source for word in words if not word.isdigit()), command
        assert ("mark.benchmark" in source) == ("-m benchmark" in command), command


@pages
def test_paths_are_there(page):
    named = [span for span in spans(page) if span.startswith(OURS) and re.fullmatch(r"[\w./-]+", span)]
    assert [path for path in named if not (ROOT / path).exists()] == []


def resolve(name: str) -> Any:
    """The object behind a dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pages
def test_dotted_names_resolve(page):
    named = {match for span in spans(page) for match in re.findall(r"(?<![\w./-])(?:ecif|pipeline)(?:\.\w+)+", span)}
    for name in sorted(named - METADATA):
        assert resolve(name) is not None


@pages
def test_imports_in_examples_resolve(page):
    code = "\n".join(match[0] for match in FENCE.finditer(read(page)))
    for module, names in re.findall(r"^from ((?:ecif|pipeline)[\w.]*) import ([\w, ]+)$", code, re.MULTILINE):
        for name in names.split(","):
            assert resolve(f"{module}.{name.strip()}") is not None


@pages
def test_configuration_keys_are_there(page):
    known = {f"{section}.{key}" for section in SECTIONS for key in _keys(section)}
    named = {match for span in spans(page) for match in re.findall(rf"^((?:{'|'.join(SECTIONS)})\.[a-z_]+)\b(?!\()", span)}
    assert {key for key in named if not key.endswith((".parquet", ".safetensors"))} <= known


def _keys(section: str) -> list[str]:
    annotation = Config.model_fields[section].annotation
    kind: type[BaseModel] = (get_args(annotation) or (annotation,))[0]
    return list(kind.model_fields)


@pages
def test_links_lead_somewhere(page):
    for place in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in place:
            continue
        path, _, anchor = place.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), place
        if anchor:
            assert anchor in anchors(target.read_text()), place


def anchors(text: str) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
