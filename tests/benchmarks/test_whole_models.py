"""What is a filter worth to a model that learns its features? Small CLIP models trained from scratch on what each rule keeps.

    pytest tests/benchmarks/test_whole_models.py -m benchmark -s

The demo's corpus with 20 % swapped captions; the test set is of an artist that no stage saw. ECIF_KEEP names a folder that
keeps the run and the trainings, so that a second call goes on.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ecif.training import SMALL
from pipeline.results.select import chosen_filter
from pipeline.results.small_images import read_corpus, read_test, rule_of_column
from pipeline.results.soft_cap import SoftCap, sample
from pipeline.results.whole_models import Rule, Trainings, judge_whole
from pipeline.run import run
from pipeline.sections import Pairs
from tests.benchmarks.support.noisy_demo import EMBEDDED, SWAPPED, noisy

pytestmark = pytest.mark.benchmark
SEEDS = 2


def test_whole_models_on_what_each_rule_keeps(tmp_path):
    folder = Path(os.environ.get("ECIF_KEEP", tmp_path)).absolute()
    done = run(noisy(folder)).finished
    uids = done.scores(["uid"])["uid"].to_pylist()
    swapped = np.isin(uids, json.loads((folder / SWAPPED).read_text()))
    share = 1 - swapped.mean()
    facts = done.checkpoints[0].targets["clean"]
    by, keep = chosen_filter(done.folder, None, None)
    every = np.ones(len(uids), np.int32)

    def drawn(name: str, column: str, how: SoftCap) -> Rule:
        return Rule(name, sample((part for _, part in done.of_shards(["uid", column])), column, how).copies)

    rules = [
        Rule("everything", every),
        Rule("oracle", (~swapped).astype(np.int32), is_oracle=True),
        rule_of_column(done, "CLIP score, oracle's budget", "held_out_cosine", share),
        rule_of_column(done, "misalignment, own share", "misalignment", 1 - facts["misaligned"]),
        rule_of_column(done, "chosen filter", by, keep),
        drawn("soft cap, 4 draws a pair", by, SoftCap(keep=4.0)),
    ]
    test = read_test(Pairs(shards=str(EMBEDDED / "test")), done.config.embed, SMALL)
    rows = judge_whole(str(folder), read_corpus(done, SMALL), test, rules, Trainings(seeds=SEEDS))
    print(f"\n{'rule':28s} {'kept':>5} {'wrong':>5} {'loss':>14} {'R@1':>5} {'R@5':>5} {'of oracle':>9}")
    for rule, row in zip(rules, rows, strict=True):
        r1, r5 = (50 * (row[f"image_to_text_r{k}"] + row[f"text_to_image_r{k}"]) for k in (1, 5))
        wrong = rule.counts[swapped].sum() / rule.counts.sum()
        print(f"{row['rule']:28s} {row['kept']:5d} {wrong:5.1%} {row['loss']:7.3f} ± {row['loss_std']:.3f}", end="")
        print(f" {r1:6.1f} {r5:5.1f} {row['share_of_oracle_gain']:8.0%}", flush=True)
    gain = {row["rule"]: row["share_of_oracle_gain"] for row in rows}
    assert gain["misalignment, own share"] > 0
