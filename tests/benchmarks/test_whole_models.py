"""What is a filter worth to a model that learns its features? Small CLIP models trained from scratch on what each rule keeps.

    pytest tests/benchmarks/test_whole_models.py -m benchmark -s -k emoji
    make results                                       # with the other tables of docs/results.md

The corpora, rules and test sets are those of `test_never_loses`. Trainings are kept: a second call goes on.
"""

import numpy as np
import pyarrow as pa
import pytest

from ecif.columns.filter import order
from ecif.training import SMALL
from pipeline.results.select import of_table
from pipeline.results.small_images import tokens_of
from pipeline.results.soft_cap import SoftCap, sample
from pipeline.results.whole_models import Pairs, Rule, Trainings, judge_whole
from tests.benchmarks.support.comparison import rules
from tests.benchmarks.support.corpora import Corpus, solved
from tests.benchmarks.support.drawings import CACHE, pixels
from tests.benchmarks.support.results import record

pytestmark = [pytest.mark.benchmark, pytest.mark.network]
SEEDS = 3
DRAWS = 4.0  # of a pair in an epoch, by soft cap


def pairs(corpus: Corpus, rows: list[int], captions: list[int]) -> Pairs:
    """Small pictures of some drawings, and the names of some."""
    names = [corpus.drawings.names[row] for row in captions]
    return Pairs(pixels(SMALL["vision_cfg"]["image_size"])[rows].numpy(), tokens_of(names, SMALL))


def soft_cap(corpus: Corpus) -> np.ndarray:
    """How often a pair is drawn in proportion to the chosen filter's column."""
    scores = order(corpus.found.probability, corpus.found.chosen.among)
    uids = [f"{row:032x}" for row in range(len(scores))]
    table = pa.table({"uid": uids, "filter_clean": scores.numpy()})
    return sample(of_table(table), "filter_clean", SoftCap(keep=DRAWS)).copies


@pytest.mark.parametrize("name", ["emoji-20", "mixture-60"])
def test_whole_models_on_what_each_rule_keeps(one_thread, name):
    corpus = solved(name, 0)
    s, order = corpus.setting, corpus.found.rows.tolist()
    counts = {rule: kept.numpy().astype(np.int32) for rule, kept in rules(corpus.found, corpus.wrong).items()}
    counts[f"soft cap, {DRAWS:g} draws a pair"] = soft_cap(corpus)
    given = [Rule(rule, of, is_oracle=rule == "oracle") for rule, of in counts.items()]
    of_corpus = pairs(corpus, [s.corpus[row] for row in order], [s.captions[row] for row in order])
    rows = judge_whole(str(CACHE / "whole" / name), of_corpus, pairs(corpus, s.test, s.test), given, Trainings(seeds=SEEDS))
    wrong = corpus.wrong.numpy()
    print(f"\n{name}, {SEEDS} seeds\n{'rule':28s} {'kept':>5} {'wrong':>5} {'loss':>15} {'R@1':>5} {'R@5':>5} {'of oracle':>9}")
    for rule, row in zip(given, rows, strict=True):
        row["wrong"] = float(rule.counts[wrong].sum() / rule.counts.sum())
        r1, r5 = (50 * (row[f"image_to_text_r{k}"] + row[f"text_to_image_r{k}"]) for k in (1, 5))
        print(f"{row['rule']:28s} {row['kept']:5d} {row['wrong']:5.1%} {row['loss']:7.3f} ± {row['loss_std']:.3f}", end="")
        print(f" {r1:6.1f} {r5:5.1f} {row['share_of_oracle_gain']:8.0%}", flush=True)
    record("whole", name, corpus=name, rows=rows)
    loss = {row["rule"]: row["loss"] for row in rows}
    spread = max(row["loss_std"] for row in rows) / np.sqrt(SEEDS)  # what a mean over the seeds is uncertain by
    cosine = min(loss[rule] for rule in loss if rule.startswith("cosine"))
    assert loss["chosen filter"] <= min(cosine, loss["misalignment, own share"]) + 2 * spread
