"""Drift is what independent implementations say, and nothing where there is none."""

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from ecif.drift import SHRINKAGE, Measure, difference, telling


def some(count: int, seed: int, shift: float = 0.0, dimensions: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, a few of them correlated, and folds."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.eye(dimensions) + 0.3 * torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(0))
    features = torch.randn(count, dimensions, generator=random) @ mix
    features[:, 0] += shift
    return features, torch.arange(count) % 4


def test_the_classifier_is_sklearns_linear_discriminant():
    (old, old_fold), (new, new_fold) = some(300, 1), some(80, 2, shift=1.0)
    areas = []
    for fold in range(4):
        train = torch.cat([old[old_fold != fold], new[new_fold != fold]]).numpy()
        is_new = np.r_[np.zeros(225), np.ones(60)]
        lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE).fit(train, is_new)
        test = torch.cat([old[old_fold == fold], new[new_fold == fold]]).numpy()
        areas.append(roc_auc_score(np.r_[np.zeros(75), np.ones(20)], lda.decision_function(test)))
    assert telling(old, old_fold, new, new_fold).value == pytest.approx(np.mean(areas), abs=0.01)


def test_pairs_that_are_drawn_alike_are_not_told_apart():
    found = [telling(*some(400, seed), *some(100, 100 + seed)) for seed in range(20)]
    values = np.array([one.value for one in found])
    assert abs(values.mean() - 0.5) < 2.5 * values.std() / np.sqrt(20)
    assert values.std() == pytest.approx(np.mean([one.error for one in found]), rel=0.6)
    assert not any(one.is_beyond(0.6) for one in found)


def test_pairs_that_are_drawn_otherwise_are():
    assert telling(*some(400, 1), *some(100, 2, shift=4.0)).is_beyond(0.9)


def test_copies_in_one_fold_are_not_recognised_by_each_other():
    """Every new pair is there ten times. Dealt over the folds, a classifier in as many dimensions would know them again."""
    old, new = some(400, 1, dimensions=100)[0], some(20, 2, dimensions=100)[0].repeat_interleave(10, 0)
    apart = telling(old, torch.arange(400) % 4, new, torch.arange(200) % 4).value
    together = telling(old, torch.arange(400) % 4, new, torch.arange(200) // 10 % 4).value
    assert apart > 0.9
    assert together < 0.7


def test_a_difference_has_the_standard_error_of_welchs_test():
    old, new = torch.randn(50, generator=torch.Generator().manual_seed(1)), 3 * torch.randn(20) + 1
    found = difference(old, new)
    truth = ttest_ind(new.double().numpy(), old.double().numpy(), equal_var=False)
    assert found.value / found.error == pytest.approx(truth.statistic)


def test_a_bound_is_passed_by_more_than_the_uncertainty():
    assert Measure(0.5, 0.1).is_beyond(0.29)
    assert not Measure(0.5, 0.1).is_beyond(0.31)
    assert not Measure(-0.5, 0.1).is_beyond(0.1)
    assert not Measure(float("nan"), float("nan")).is_beyond(0.0)


def test_one_pair_says_nothing():
    assert not difference(torch.zeros(9), torch.ones(1)).is_beyond(0.5)
