"""The shape of the code: small files, and a recipe that stays a recipe."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_file_is_long_and_the_recipe_is_short():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in listed if (ROOT / name).exists()}
    assert {name: length for name, length in lengths.items() if length > 350} == {}
    assert lengths["pipeline/run.py"] <= 130
