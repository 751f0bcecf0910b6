"""Influence against really training again without each pair, where that has one answer: a convex contrastive model."""

import pytest
import torch
from scipy.stats import spearmanr
from torch.func import grad, hessian

from ecif.losses.contrastive import batch_loss, pair_derivatives
from tests.support.convex import BATCHES, CLEAN, D_IMAGE, D_TEXT, logits, objective, train


@pytest.fixture(scope="module")
def truth_and_scores():
    """True change of the target loss without each pair, and the predictions, in the order of the batches."""
    w = train(BATCHES, torch.zeros(D_TEXT * D_IMAGE, dtype=torch.float64))
    direction = torch.linalg.solve(hessian(objective)(w, BATCHES), grad(lambda v: batch_loss(logits(v, CLEAN)))(w))
    truth, scores = [], {"positive": [], "exact": [], "taylor": [], "reciprocal": []}
    for m, rows in enumerate(BATCHES):
        s, tangent = logits(w, rows), logits(direction, rows)
        positive, exact = pair_derivatives(s, tangent, "exact")
        scores["positive"] += positive.tolist()
        scores["exact"] += (positive + exact).tolist()
        scores["taylor"] += (positive + pair_derivatives(s, tangent, "taylor")[1]).tolist()
        for n in range(len(rows)):
            others = torch.arange(len(rows)) != n

            def printed(t, s=s, n=n, others=others, tangent=tangent):  # sum 1/P, as transcriptions of the paper have it
                moved = s + t * tangent
                return (1 / moved.softmax(1)[others, n]).sum() + (1 / moved.softmax(0)[n, others]).sum()

            scores["reciprocal"].append((positive[n] + grad(printed)(torch.zeros((), dtype=torch.float64))).item())
            rest = [rows[others] if i == m else b for i, b in enumerate(BATCHES)]
            after = train(rest, w)
            truth.append((batch_loss(logits(after, CLEAN)) - batch_loss(logits(w, CLEAN))).item())
    return truth, scores


def test_both_parts_rank_pairs_as_retraining_does(truth_and_scores):
    truth, scores = truth_and_scores
    agreement = {name: spearmanr(values, truth)[0] for name, values in scores.items()}
    print({name: round(float(value), 3) for name, value in agreement.items()})
    assert agreement["exact"] >= 0.85
    assert agreement["taylor"] >= 0.85
    assert agreement["exact"] > agreement["positive"]


def test_the_sign_is_that_of_the_change(truth_and_scores):
    truth, scores = truth_and_scores
    clear = [i for i, t in enumerate(truth) if abs(t) > 0.2 * max(map(abs, truth))]
    assert len(clear) > 5
    right = [(scores["exact"][i] > 0) == (truth[i] > 0) for i in clear]
    assert sum(right) >= 0.9 * len(clear)


def test_the_printed_reciprocal_does_not_predict_retraining(truth_and_scores):
    truth, scores = truth_and_scores
    assert spearmanr(scores["reciprocal"], truth)[0] < 0.5
