import pytest
import torch
from torch.func import grad, hessian, jvp

from ecif.losses.contrastive import (
    batch_loss,
    gauss_newton_cotangent,
    loss_cotangent,
    negative_loss,
    pair_derivatives,
    pair_loss,
)
from tests.support.problems import slow_loss, without

S = 3 * torch.randn(9, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TANGENT = torch.randn(9, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def test_loss_is_the_sum_of_its_terms():
    assert torch.allclose(batch_loss(S), slow_loss(S))
    labels = torch.arange(9)
    open_clip = (torch.nn.functional.cross_entropy(S, labels) + torch.nn.functional.cross_entropy(S.T, labels)) / 2
    assert torch.allclose(batch_loss(S) / (2 * 9), open_clip)


def test_positive_and_negative_are_exactly_what_removal_takes_away():
    removed = pair_loss(S) + negative_loss(S, "exact")
    truth = torch.stack([slow_loss(S) - slow_loss(without(S, n)) for n in range(9)])
    assert torch.allclose(removed, truth, rtol=1e-12)


def test_taylor_negative_is_the_derivative_of_the_papers_perturbation_and_the_printed_reciprocal_is_not():
    # ECIF perturbs S + log(zeta) E_n, E_n being 1 at the negatives of pair n; the influence is minus d/dzeta at zeta = 1.
    def perturbed(zeta, n):
        e = torch.zeros(9, 9, dtype=torch.float64)
        e[:, n] = 1
        rows = (S + torch.log(zeta) * (e - torch.diag(e.diag()))).logsumexp(1).sum()
        columns = (S + torch.log(zeta) * (e - torch.diag(e.diag())).T).logsumexp(0).sum()
        return rows + columns

    one, h = torch.tensor(1.0, dtype=torch.float64), 1e-6
    slope = torch.stack([(perturbed(one + h, n) - perturbed(one - h, n)) / (2 * h) for n in range(9)])
    assert torch.allclose(negative_loss(S, "taylor"), slope, rtol=1e-6)
    reciprocal = (1 / S.softmax(1)).sum(0) + (1 / S.softmax(0)).sum(1)
    assert torch.corrcoef(torch.stack([reciprocal, slope]))[0, 1] < 0.5


def test_exact_negative_survives_a_confident_wrong_pair():
    s = S.clone()
    s[2, 5] += 200  # 1 - P_25 underflows even in float64
    truth = torch.stack([batch_loss(s) - batch_loss(without(s, n)) for n in range(9)])
    assert torch.allclose(pair_loss(s) + negative_loss(s), truth)
    single = pair_loss(s.float()) + negative_loss(s.float())
    assert torch.allclose(single.double(), truth, rtol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "taylor"])
def test_pair_derivatives_against_autograd_and_finite_differences(kind):
    positive, negative = pair_derivatives(S, TANGENT, kind)
    assert torch.allclose(positive, jvp(pair_loss, (S,), (TANGENT,))[1])
    assert torch.allclose(negative, jvp(lambda s: negative_loss(s, kind), (S,), (TANGENT,))[1])
    h = 1e-6
    slope = (negative_loss(S + h * TANGENT, kind) - negative_loss(S - h * TANGENT, kind)) / (2 * h)
    assert torch.allclose(negative, slope, rtol=1e-6, atol=1e-8)


def test_negative_derivative_survives_a_confident_wrong_pair():
    s = S.clone()
    s[2, 5] += 40  # P = 1 in float32: P / (1 - P) (S' - mean) would be infinity times zero
    _, truth = pair_derivatives(s, TANGENT)
    assert torch.allclose(truth, jvp(negative_loss, (s,), (TANGENT,))[1])
    _, single = pair_derivatives(s.float(), TANGENT.float())
    assert torch.allclose(single.double(), truth, rtol=1e-4, atol=1e-5)


def test_first_and_second_derivative_of_the_loss():
    assert torch.allclose(loss_cotangent(S), grad(slow_loss)(S))
    full = hessian(slow_loss)(S).reshape(81, 81)
    assert torch.allclose(gauss_newton_cotangent(S, TANGENT).flatten(), full @ TANGENT.flatten())


@pytest.mark.parametrize("kind", ["exact", "taylor"])
def test_a_pair_alone_in_its_batch_is_nobodys_negative(kind):
    alone = torch.tensor([[2.0]])
    assert negative_loss(alone, kind).tolist() == [0.0]
    assert [part.tolist() for part in pair_derivatives(alone, torch.tensor([[1.0]]), kind)] == [[0.0], [0.0]]
