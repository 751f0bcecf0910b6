"""What holds for every score of pairs: who scores a pair, over what it is averaged, and what its column is called."""

import pytest
import torch

from ecif.columns import ClipScore, Column, HeldOutPairs, PairScore, held_out_values
from ecif.columns.filter import filter_column
from ecif.columns.influence import LEVERAGE, influence_columns
from ecif.columns.misalignment import MISALIGNMENT
from tests.support.problems import held_out_pairs, random_heads

PAIRS = held_out_pairs()
FITTED = [[random_heads(10 * fold + seed) for seed in range(2)] for fold in range(3)]


@pytest.mark.parametrize("score", [kind for kind in PairScore.kinds.values() if kind.of_fold], ids=lambda kind: kind.name)
def test_every_pair_is_scored_by_the_heads_that_did_not_see_its_fold(score):
    values = held_out_values(score(), PAIRS, FITTED)
    for n, fold in enumerate(PAIRS.fold.tolist()):
        assert values[n] == score().values(PAIRS._replace(fitted=FITTED[fold]))[n]
    changed = held_out_values(score(), PAIRS, [FITTED[0], FITTED[1], [random_heads(99)]])
    assert torch.equal(changed == values, PAIRS.fold != 2)


@pytest.mark.parametrize("score", [kind for kind in PairScore.kinds.values() if not kind.of_fold], ids=lambda kind: kind.name)
def test_the_other_scores_do_not_depend_on_fitted_heads(score):
    values = held_out_values(score(), PAIRS, FITTED)
    assert torch.equal(values, score().values(PAIRS._replace(fitted=[])))


@pytest.mark.parametrize("score", PairScore.kinds.values(), ids=lambda kind: kind.name)
def test_a_score_is_one_finite_number_a_pair_and_none_for_no_pairs(score):
    values = held_out_values(score(), PAIRS, FITTED)
    assert values.shape == (12,)
    assert values.isfinite().all()
    nobody = torch.arange(0)
    none = PAIRS._replace(images=PAIRS.images[nobody], texts=PAIRS.texts[nobody], fold=PAIRS.fold[nobody], batches=[])
    assert held_out_values(score(), none, FITTED).shape == (0,)


def test_a_pair_gets_the_mean_over_its_batches_and_a_pair_in_no_batch_gets_none():
    batches = [torch.tensor([0, 1, 2]), torch.tensor([2, 3]), torch.tensor([2, 0])]
    pairs = PAIRS._replace(images=PAIRS.images[:5], batches=batches)
    mean = pairs.mean_over_batches(lambda rows: 10.0 * rows + len(rows))
    assert mean[:4].tolist() == [2.5, 13.0, pytest.approx(20 + 7 / 3), 32.0]
    assert mean[4].isnan()


def test_heads_are_averaged_over_the_seeds():
    mean = PAIRS.mean_over_seeds(lambda heads: heads.image.sum().expand(12))
    assert torch.allclose(mean, torch.stack([heads.image.sum() for heads in PAIRS.fitted]).mean().expand(12))


def test_a_score_of_one_s_own_is_a_column():
    class NormOfTarget(PairScore, name="norm_of_target"):
        good, unit, says, each_target = "low", "1", "A number of the target.", True

        def values(self, pairs: HeldOutPairs) -> torch.Tensor:
            return pairs.images.norm(dim=1)

    try:
        assert PairScore.kinds["norm_of_target"] is NormOfTarget
        assert Column.of(NormOfTarget, "coco") == ("norm_of_target_coco", "low", "1", "A number of the target.")
    finally:
        del PairScore.kinds["norm_of_target"]
    assert Column.of(ClipScore, "coco").name == "clip_score"


def test_every_column_says_in_one_sentence_what_it_is():
    columns = [Column.of(kind, "coco") for kind in PairScore.kinds.values()]
    columns += [*influence_columns("coco"), MISALIGNMENT, filter_column("coco"), LEVERAGE]
    assert len({column.name for column in columns}) == len(columns)
    for column in columns:
        assert column.good in ("high", "low")
        assert column.unit
        assert column.says.endswith(".")
        assert column.says[0].isupper()


def test_influence_has_the_unit_of_its_target():
    columns = influence_columns("coco", "cosine")
    assert [column.name for column in columns] == ["influence_positive_coco", "influence_negative_coco", "influence_coco"]
    assert {column.unit for column in columns} == {"cosine"}
