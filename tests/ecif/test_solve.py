import pytest
import torch

from ecif.solve import Lanczos, krylov, largest_eigenvalue_of_matrix

P = 30
G = torch.Generator().manual_seed(0)
MATRICES = torch.stack([(a := torch.randn(P, P, generator=G, dtype=torch.float64)) @ a.T for _ in range(3)])
GRADIENTS = torch.randn(3, P, generator=G, dtype=torch.float64)


def product(vectors):
    return torch.einsum("npq,nq->np", MATRICES, vectors)


def explicit(damping):
    shifted = MATRICES + damping[:, None, None] * torch.eye(P, dtype=torch.float64)
    return torch.linalg.solve(shifted, GRADIENTS)


def test_one_run_of_products_solves_every_damping():
    spaces = krylov(product, GRADIENTS, P)
    for damping in (torch.tensor([1e-3, 1e-3, 1e-3]), torch.tensor([0.1, 3.0, 100.0])):
        solution, residual = spaces.solve(damping)
        assert torch.allclose(solution, explicit(damping.double()), rtol=1e-6)
        assert (residual < 1e-8).all()


def test_the_residual_it_reports_is_the_residual():
    damping = torch.full((3,), 2.0, dtype=torch.float64)
    for steps in (2, 5, 9):
        solution, residual = krylov(product, GRADIENTS, steps).solve(damping)
        left = GRADIENTS - product(solution) - damping[:, None] * solution
        assert torch.allclose(residual, left.norm(dim=1) / GRADIENTS.norm(dim=1), rtol=1e-6)


def test_largest_eigenvalue():
    assert torch.allclose(krylov(product, GRADIENTS, 25).largest_eigenvalue(), torch.linalg.eigvalsh(MATRICES)[:, -1])


def test_largest_eigenvalue_of_a_matrix():
    for matrix in MATRICES:
        truth = torch.linalg.eigvalsh(matrix)[-1].item()
        assert largest_eigenvalue_of_matrix(matrix) == pytest.approx(truth, rel=1e-6)


def test_an_exhausted_space_is_an_exact_answer():
    low_rank = torch.zeros(P, P, dtype=torch.float64)
    low_rank[:3, :3] = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    gradient = torch.randn(1, P, generator=G, dtype=torch.float64)
    solution, residual = krylov(lambda v: v @ low_rank, gradient, 12).solve(torch.tensor([0.5]))
    truth = torch.linalg.solve(low_rank + 0.5 * torch.eye(P, dtype=torch.float64), gradient[0])
    assert torch.allclose(solution[0], truth)
    assert residual[0] < 1e-8


def test_single_precision_keeps_the_basis_orthogonal():
    lanczos = Lanczos(GRADIENTS.float(), 25)
    while lanczos.step(torch.einsum("npq,nq->np", MATRICES.float(), lanczos.vectors)):
        pass
    overlap = lanczos.basis[:, :25] @ lanczos.basis[:, :25].transpose(1, 2)
    assert torch.allclose(overlap, torch.eye(25).expand(3, 25, 25), atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_target_without_a_gradient_is_an_error(bad):
    gradients = GRADIENTS.clone()
    gradients[1] = bad
    with pytest.raises(ValueError, match="zero or not finite"):
        krylov(product, gradients, 3)
