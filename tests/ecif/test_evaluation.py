import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from ecif.evaluation import auroc, calibrated_loss, linear_datamodeling_score, precision_at, ranks, retrieval_recall, spearman
from ecif.heads import Heads, embed, logits
from ecif.losses.contrastive import batch_loss
from tests.support.problems import random_features, random_heads

VALUES = torch.tensor([3.0, 1.0, 1.0, -2.0, 7.0, 3.0, 3.0])
BAD = torch.tensor([True, False, True, False, True, False, False])


def test_ranks_average_ties():
    assert ranks(VALUES).tolist() == [4, 1.5, 1.5, 0, 6, 4, 4]


def test_spearman_against_scipy():
    other = torch.tensor([0.3, 0.1, 0.2, 0.9, 0.5, 0.5, 0.0])
    assert spearman(VALUES, other).item() == pytest.approx(spearmanr(VALUES, other)[0])


def test_auroc_against_sklearn_ties_included():
    assert auroc(VALUES, BAD) == pytest.approx(roc_auc_score(BAD, VALUES))
    assert auroc(BAD.float(), BAD) == 1.0


def test_precision_counts_the_worst_ranked():
    assert precision_at(VALUES, BAD, 1) == 1.0
    assert precision_at(VALUES, BAD, 7) == pytest.approx(3 / 7)


def test_lds_is_one_for_an_additive_truth_and_minus_one_for_its_opposite():
    g = torch.Generator().manual_seed(0)
    influence, removed = torch.randn(3, 50, generator=g), torch.rand(20, 50, generator=g) < 0.3
    losses = 5 + removed.float() @ influence.T
    assert linear_datamodeling_score(influence, removed, losses) == pytest.approx(1.0)
    assert linear_datamodeling_score(-influence, removed, losses) == pytest.approx(-1.0)


def test_recall_of_matching_pairs_is_one_and_of_constant_embeddings_zero():
    heads = random_heads()
    images, texts = random_features(30)
    assert 0 <= retrieval_recall(heads, images, texts, 1) <= retrieval_recall(heads, images, texts, 5) <= 1
    assert retrieval_recall(heads, images, texts, 30) == 1.0
    same = images[:1].expand(30, -1)
    assert retrieval_recall(heads, same, texts, 5) < 0.5  # ties count against


@pytest.mark.parametrize("scale", [2.0, 8.0, 40.0])
def test_calibrated_loss_is_that_of_the_best_scale_whatever_the_heads_own(scale):
    images, _ = random_features(30)
    texts = images + 2.0 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heads = Heads(torch.eye(7).double(), torch.eye(7).double(), scale)
    plain = lambda s: batch_loss(logits(heads._replace(logit_scale=s), embed(heads, images, texts))).item() / 60  # noqa: E731
    best = min(plain(s) for s in torch.linspace(0.5, 40, 8000).tolist())
    assert calibrated_loss(heads, images, texts) == pytest.approx(best, abs=1e-4)
