"""What is a filter worth to a model that learns its features? Small CLIP models, trained on what each rule keeps: from scratch,
or from a model that has learned from drawings and names of another kind.

    pytest tests/benchmarks/test_whole_models.py -m benchmark -s -k emoji
    make results                                       # with the other tables of docs/results.md

The corpora, rules and test sets are those of `test_never_loses`. Trainings are kept: a second call goes on.
"""

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ecif.columns.filter import order
from ecif.training import SMALL, Recipe, build, train
from pipeline.results.select import of_table
from pipeline.results.small_images import tokens_of
from pipeline.results.soft_cap import SoftCap, sample
from pipeline.results.whole_models import Pairs, Rule, Trainings, judge_whole
from tests.benchmarks.support.comparison import rules
from tests.benchmarks.support.corpora import ICONS, Corpus, solved
from tests.benchmarks.support.drawings import CACHE, Drawings, drawings, pixels
from tests.benchmarks.support.results import record

pytestmark = [pytest.mark.benchmark, pytest.mark.network]
SEEDS = 3
DRAWS = 4.0  # of a pair in an epoch, by soft cap
FINE_TUNED = Recipe(steps=110, learning_rate=3e-4)
CASES = {  # corpus, and whether a model is fine-tuned
    "emoji-20": ("emoji-20", False),
    "mixture-60": ("mixture-60", False),
    "emoji-20, fine-tuned": ("emoji-20", True),
    "mixture-60, fine-tuned": ("mixture-60", True),
}


def pretrained() -> dict[str, Tensor]:
    """The weights of a small CLIP that was trained on icons; trained once and kept."""
    path = CACHE / "whole" / "icons.safetensors"
    if not path.exists():
        of, model = drawings(), build(SMALL, 0)
        icons = of.of(*ICONS)
        train(model, pairs(of, icons, icons).tensors(), torch.ones(len(icons), dtype=torch.int32), Recipe(), 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return load_file(path)


def pairs(of: Drawings, rows: list[int], captions: list[int]) -> Pairs:
    """Small pictures of some drawings, and the names of some."""
    names = [of.names[row] for row in captions]
    return Pairs(pixels(SMALL["vision_cfg"]["image_size"])[rows].numpy(), tokens_of(names, SMALL))


def soft_cap(corpus: Corpus) -> np.ndarray:
    """How often a pair is drawn in proportion to the chosen filter's column."""
    scores = order(corpus.found.probability, corpus.found.chosen.among)
    uids = [f"{row:032x}" for row in range(len(scores))]
    table = pa.table({"uid": uids, "filter_clean": scores.numpy()})
    return sample(of_table(table), "filter_clean", SoftCap(keep=DRAWS)).copies


@pytest.mark.parametrize("case", CASES)
def test_whole_models_on_what_each_rule_keeps(one_thread, case):
    name, fine_tuned = CASES[case]
    corpus, how = solved(name, 0), Trainings(seeds=SEEDS)
    if fine_tuned:
        how = how._replace(recipe=FINE_TUNED, weights=pretrained())
    s, order = corpus.setting, corpus.found.rows.tolist()
    counts = {rule: kept.numpy().astype(np.int32) for rule, kept in rules(corpus.found, corpus.wrong).items()}
    counts[f"soft cap, {DRAWS:g} draws a pair"] = soft_cap(corpus)
    given = [Rule(rule, of, is_oracle=rule == "oracle") for rule, of in counts.items()]
    of_corpus = pairs(corpus.drawings, [s.corpus[row] for row in order], [s.captions[row] for row in order])
    test = pairs(corpus.drawings, s.test, s.test)
    rows = judge_whole(str(CACHE / "whole" / name), of_corpus, test, given, how)
    wrong = corpus.wrong.numpy()
    print(f"\n{case}, {SEEDS} seeds\n{'rule':28s} {'kept':>5} {'wrong':>5} {'loss':>15} {'R@1':>5} {'R@5':>5} {'of oracle':>9}")
    for rule, row in zip(given, rows, strict=True):
        row["wrong"] = float(rule.counts[wrong].sum() / rule.counts.sum())
        r1, r5 = (50 * (row[f"image_to_text_r{k}"] + row[f"text_to_image_r{k}"]) for k in (1, 5))
        print(f"{row['rule']:28s} {row['kept']:5d} {row['wrong']:5.1%} {row['loss']:7.3f} ± {row['loss_std']:.3f}", end="")
        print(f" {r1:6.1f} {r5:5.1f} {row['share_of_oracle_gain']:8.0%}", flush=True)
    record("whole", case, corpus=case, rows=rows)
    loss = {row["rule"]: row["loss"] for row in rows}
    spread = max(row["loss_std"] for row in rows) / np.sqrt(SEEDS)  # what a mean over the seeds is uncertain by
    cosine = min(loss[rule] for rule in loss if rule.startswith("cosine"))
    assert loss["chosen filter"] <= min(cosine, loss["misalignment, own share"]) + 2 * spread
