"""Components are those of a union-find and of SciPy, whatever the blocks."""

import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ecif import components
from ecif.components import connected, joined


def rows(count: int, width: int, clusters: int, spread: float, seed: int) -> torch.Tensor:
    """Unit rows around some centres, rounded as those of `ecif.copies.directions`."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=g)
    found = centres[torch.randint(clusters, (count,), generator=g)] + spread * torch.randn(count, width, generator=g)
    return ((found / found.norm(dim=1, keepdim=True) * 2**11).round() / 2**11).half()


def union_find(units: torch.Tensor, threshold: float) -> list[int]:
    """The least row of each row's component, edge by edge."""
    parent = list(range(len(units)))

    def root(n: int) -> int:
        while parent[n] != n:
            n = parent[n]
        return n

    for i, j in (units.double() @ units.double().T > threshold).nonzero().tolist():
        a, b = sorted((root(i), root(j)))
        parent[b] = a
    return [root(n) for n in range(len(units))]


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("seed", range(3))
def test_components_are_those_of_a_union_find_and_of_scipy(threshold, seed):
    units = rows(150, 6, 20, 0.15, seed)
    found = connected(units, threshold)
    assert found.tolist() == union_find(units, threshold)
    _, truth = connected_components(coo_matrix((units.double() @ units.double().T > threshold).numpy()), directed=False)
    assert (found[:, None] == found[None]).tolist() == (truth[:, None] == truth[None]).tolist()
    assert 1 < len(found.unique()) < 150


def test_a_chain_in_any_order_is_one_component():
    angles = torch.linspace(0, 3, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    units = torch.stack([angles.cos(), angles.sin()], 1).half()
    assert connected(units, 0.99).tolist() == [0] * 200


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_components_do_not_depend_on_the_blocks(monkeypatch, block):
    units = rows(130, 5, 15, 0.2, 4)
    whole = connected(units, 0.9)
    monkeypatch.setattr(components, "BLOCK", block)
    assert torch.equal(connected(units, 0.9), whole)


def test_edges_may_come_in_any_number_of_calls():
    g = torch.Generator().manual_seed(0)
    first, second = torch.randint(500, (2, 300), generator=g)
    whole = joined(torch.arange(500), first, second)
    parts = torch.arange(500)
    for a, b in zip(second.flip(0).split(17), first.flip(0).split(17), strict=True):
        parts = joined(parts, a, b)
    assert torch.equal(parts, whole)
