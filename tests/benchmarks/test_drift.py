"""What nights say of pairs like those before, of swapped ones, and of another artist's.

pytest tests/benchmarks/test_drift.py -m benchmark -s
"""

import random
from collections import defaultdict
from pathlib import Path

import pytest

from jobs.demo.model import build_model
from pipeline.config import Config
from pipeline.night import night
from tests.support.corpora import EMBEDDED
from tests.support.tars import read_tar, write_tar

pytestmark = pytest.mark.benchmark
Pair = tuple[str, dict[str, bytes]]  # key, and members by suffix


def pairs(tar: Path) -> list[Pair]:
    found = defaultdict[str, dict[str, bytes]](dict)
    for name, data in read_tar(tar):
        key, _, suffix = name.partition(".")
        found[key][suffix] = data
    return list(found.items())


def swapped(of: list[Pair], share: float, rng: random.Random) -> list[Pair]:
    """The pairs with the captions of a share of them passed on to the next one."""
    rows = rng.sample(range(len(of)), round(share * len(of)))
    captions = {row: of[other][1]["txt"] for row, other in zip(rows, rows[1:] + rows[:1], strict=True)}
    return [(key, members | ({"txt": captions[row]} if row in captions else {})) for row, (key, members) in enumerate(of)]


def test_drift_of_known_nights(tmp_path, local_ray):
    rng, corpus = random.Random(0), tmp_path / "corpus"
    every = [pair for number in range(3) for pair in pairs(EMBEDDED / "corpus" / f"{number:05d}.tar")]
    rng.shuffle(every)
    dealt = [every[number::6] for number in range(6)]
    config = Config.model_validate(
        {
            "run": str(tmp_path / "run"),
            "corpus": {"shards": str(corpus)},
            "model": {"name": build_model(tmp_path / "model")},
            "targets": {"clean": {"shards": str(EMBEDDED / "target")}},
        }
    )

    def write(name: str, of: list[Pair]) -> None:
        write_tar(
            corpus / f"{name}.tar", [(f"{key}.{suffix}", data) for key, members in of for suffix, data in members.items()]
        )

    for number in range(4):
        write(f"{number:05d}", swapped(dealt[number], 0.1, rng))
    assert night(config).state == "done"
    passed = {}
    for name, of in {
        "alike": swapped(dealt[4], 0.1, rng),
        "swapped": swapped(dealt[5], 1.0, rng),
        "another artist": [(f"test{key}", members) for key, members in pairs(EMBEDDED / "test" / "00000.tar")],
    }.items():
        write(name, of)
        drift = night(config).generation.record["night"]["drift"]
        measures = ", ".join(f"{measure} {value:+.2f}" for measure, (value, _) in drift["measures"].items())
        print(f"\n{name:<15} {measures}; beyond: {drift['beyond']}", flush=True)
        passed[name] = {text.split()[0] for text in drift["beyond"]}
    assert passed == {"alike": set(), "swapped": {"held_out_loss", "misaligned"}, "another artist": set()}
