"""Rules are judged by whole models: every training is done once, and no call does again what another has done."""

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.results.whole_models import Pairs, Rule, Trainings, judge_whole
from tests.support.coloured import RECIPE, TINY, coloured

N = 64
HOW = Trainings(TINY, RECIPE, seeds=2)
EVERY = np.ones(N, np.int32)


def pairs(count: int, seed: int = 0) -> Pairs:
    found = coloured(count, seed=seed)
    return Pairs(found.pixels.numpy(), found.tokens.numpy())


@pytest.fixture(scope="module")
def swapped() -> Pairs:
    """A corpus of which half of the captions are those of another class."""
    good = pairs(N)
    tokens = good.tokens.copy()
    tokens[::2, 1] = (tokens[::2, 1] + 2) % 8 + 1
    return Pairs(good.pixels, tokens)


RULES = [Rule("everything", EVERY), Rule("oracle", EVERY * (np.arange(N) % 2).astype(np.int32), True), Rule("same", EVERY)]


@pytest.fixture(scope="module")
def judged(swapped, tmp_path_factory, local_ray):
    folder = tmp_path_factory.mktemp("judged")
    return folder, judge_whole(str(folder), swapped, pairs(40, 5), RULES, HOW)


def results(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "whole_models").iterdir()}


def test_the_oracle_is_better_than_no_filter(judged):
    everything, oracle, _ = judged[1]
    assert (everything["kept"], oracle["kept"], oracle["drawn"]) == (64, 32, 32)
    assert oracle["loss"] < everything["loss"] - 0.1
    assert (everything["share_of_oracle_gain"], oracle["share_of_oracle_gain"]) == (0, 1)


def test_rules_that_keep_the_same_share_their_trainings(judged):
    folder, (everything, _, same) = judged
    assert len(results(folder)) == 4  # 2 seeds of 2 rules
    assert everything | {"rule": "same"} == same


def test_only_what_is_missing_is_trained_again_and_gives_the_same_bytes(judged, swapped):
    folder, rows = judged
    before = results(folder)
    gone = sorted(before)[1]
    os.remove(folder / "whole_models" / gone)
    assert judge_whole(str(folder), swapped, pairs(40, 5), RULES, HOW) == rows
    after = results(folder)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert {name for name in after if after[name] != before[name]} == {gone}


def test_a_call_that_finds_everything_starts_nothing(judged, swapped, monkeypatch):
    monkeypatch.setattr("pipeline.results.whole_models.session", None)
    assert judge_whole(str(judged[0]), swapped, pairs(40, 5), RULES, HOW) == judged[1]


def test_what_a_training_depends_on_is_in_its_name(swapped):
    names = {how.fingerprint() for how in (HOW, HOW._replace(architecture=TINY | {"embed_dim": 16}))}
    names |= {HOW._replace(recipe=RECIPE._replace(**change)).fingerprint() for change in ({"steps": 41}, {"jitter": 0.5})}
    assert len(names) == 4
    assert HOW._replace(seeds=5).fingerprint() == HOW.fingerprint()  # more seeds keep the first ones
    assert swapped.content != pairs(N).content


@pytest.mark.parametrize("counts", [EVERY[1:], 0 * EVERY, -EVERY])
def test_a_rule_without_pairs_is_refused(swapped, tmp_path, counts):
    with pytest.raises(UserError, match="rule 'odd'"):
        judge_whole(str(tmp_path), swapped, pairs(40, 5), [Rule("odd", counts)], HOW)
