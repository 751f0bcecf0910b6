"""Nights that are killed, at any moment, lose nothing and end with the same bytes; and whatever comes after what, no generation
that is kept loses a file."""

import random
import shutil
from pathlib import Path

import pytest
from deltalake import DeltaTable

from pipeline import night as nights
from pipeline import storage
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.operate.history import rollback
from pipeline.operate.prune import prune
from pipeline.operate.verify import verify
from pipeline.run_folder.generations import Generations
from pipeline.storage import objects
from tests.support.corpora import EMBEDDED
from tests.support.tars import read_tar, write_tar

slow = pytest.mark.slow
PAIRS = 36


def add(corpus: Path, name: str, variant: int) -> None:
    """Write a shard, one of six contents."""
    members = read_tar(EMBEDDED / "corpus" / f"0000{1 + variant % 2}.tar")
    write_tar(corpus / f"{name}.tar", members[3 * PAIRS * (variant // 2) : 3 * PAIRS * (variant // 2 + 1)])


def columns(run: Path, number: int | None = None) -> dict[str, bytes]:
    """Bytes of each shard's columns in a generation."""
    files = Generations(str(run)).at(number).files
    return {shard: (run / "table" / file.path).read_bytes() for shard, file in files.items()}


@pytest.fixture
def growing(tmp_path, pairs):
    """A corpus that can be written to."""
    shutil.copytree(pairs, tmp_path / "pairs")
    return tmp_path / "pairs"


def test_a_night_that_was_killed_is_followed_by_the_next(ecif, configure, growing, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ecif("nightly", configure(whole, growing)).wait().code == 0
    shutil.copytree(whole, run)
    add(growing / "corpus", "00007", 0)
    add(growing / "corpus", "00008", 1)
    assert ecif("nightly", configure(whole, growing)).wait().code == 0
    for stage in ("features/*/00007", "pairs/*/00007.*"):
        command = ecif("nightly", configure(run, growing))
        assert command.wait_until(lambda stage=stage: list(run.glob(stage)))
        assert command.kill()
        assert Generations(str(run)).last().number == 0, "readers see the generation before"
    ended = ecif("nightly", configure(run, growing)).wait()
    assert (ended.code, ended.out.strip()) == (0, "generation 1"), ended
    assert columns(run) == columns(whole)
    again = ecif("nightly", configure(run, growing)).wait()
    assert (again.code, again.out.strip(), again.last) == (10, "generation 1", "night: nothing new"), again
    assert ecif("nightly", "--exit-zero", configure(run, growing)).wait().code == 0


@slow
def test_of_two_nights_at_once_one_works(ecif, configure, growing, tmp_path):
    config = configure(tmp_path / "run", growing)
    ended = sorted(command.wait() for command in [ecif("nightly", config) for _ in range(2)])
    assert [one.code for one in ended] == [0, 2]
    assert "another run is at work" in ended[1].last


class Killed(BaseException):
    """What no code catches."""


class Model:
    """What a run folder with nights has to hold, whatever was done to it: which content each shard had in each generation."""

    def __init__(self, folder: Path, rng: random.Random):
        self.corpus, self.run, self.rng = folder / "corpus", folder / "run", rng
        self.now: dict[str, tuple[int, int]] = {}  # content of each shard, and how many shards were written before
        self.generations: list[tuple[dict[str, tuple[int, int]], int]] = []  # shards, and the seed that they were scored with
        self.kept = set[int]()
        self.bytes: dict[tuple[str, int, int], bytes] = {}  # of the columns of a shard, by its content and the seed
        self.seed = self.seeds = self.written = 0

    def change_corpus(self) -> None:
        """Add, change or remove a shard."""
        name = f"{self.rng.randrange(7):05d}"
        if name in self.now and len(self.now) > 3 and self.rng.random() < 0.4:
            (self.corpus / f"{name}.tar").unlink()
            del self.now[name]
        else:
            self.now[name] = (self.rng.randrange(6), self.written)
            self.written += 1
            add(self.corpus, name, self.now[name][0])

    def committed(self) -> int:
        """What a night has to commit now: one generation, or none if nothing has changed."""
        if self.generations and self.generations[-1] == (self.now, self.seed):
            return 0
        self.generations.append((dict(self.now), self.seed))
        self.kept.add(len(self.generations) - 1)
        return 1

    def check(self) -> None:
        """Every generation that is kept has the bytes that it had when it was committed."""
        found = Generations(str(self.run))
        assert [one.number for one in found.history()] == list(reversed(range(len(self.generations))))
        for number in self.kept:
            shards, seed = self.generations[number]
            of_shards = columns(self.run, number)
            assert of_shards.keys() == shards.keys()
            assert DeltaTable(self.run / "table", version=number).to_pyarrow_table().num_rows == PAIRS * len(shards)
            for shard, data in of_shards.items():
                assert self.bytes.setdefault((shard, shards[shard][0], seed), data) == data


@slow
@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_of_nights_kills_rollbacks_renewals_and_prunes_loses_a_generation(
    seed, configure, growing, monkeypatch, local_ray
):
    shutil.rmtree(growing / "corpus")
    (growing / "corpus").mkdir()
    model, rng = Model(growing, random.Random(seed)), random.Random(seed)

    def night() -> int:
        return nights.night(Config.from_yaml(configure(model.run, growing, seed=model.seed))).committed

    def killed() -> None:
        """Kill a night when it has written a few objects, or let it end."""
        left = rng.randrange(1, 12)

        def guard() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(objects, "check_guard", guard)
            patch.setattr(storage, "check_guard", guard)
            try:
                done = night()
            except Killed:
                return
        assert done == model.committed()

    def go_back() -> None:
        to = rng.randrange(len(model.generations))
        if to not in model.kept or to == len(model.generations) - 1:
            with pytest.raises(UserError):
                rollback(str(model.run), to)
            return
        model.generations.append(model.generations[to])
        model.kept.add(rollback(str(model.run), to))
        model.seed = model.generations[to][1]

    for _ in range(4):
        model.change_corpus()
    for _ in range(14):
        for _ in range(rng.randrange(3)):
            model.change_corpus()
        what = rng.choice(["night", "night", "killed", "rollback", "renewal", "prune"] if model.kept else ["killed", "night"])
        if what == "killed":
            killed()
        elif what == "rollback":
            go_back()
        elif what == "prune":
            keep = rng.randrange(1, 4)
            prune(str(model.run), keep, dry_run=False)
            model.kept &= set(range(len(model.generations) - keep, len(model.generations)))
        else:
            if what == "renewal":
                model.seeds += 1
                model.seed = model.seeds
            assert night() == model.committed()
        model.check()
    assert night() == model.committed()
    model.check()
    wrong: list[object] = []
    verify(str(model.run), wrong.append)
    assert wrong == []
