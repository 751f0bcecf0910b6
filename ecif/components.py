"""Connected components of near rows, a block of the matrix of cosines at a time."""

import torch
from torch import Tensor

BLOCK = 2048  # rows; so many times as many cosines are in memory at once. No result depends on it


def connected(units: Tensor, threshold: float) -> Tensor:
    """Components [N] int64 of the graph whose edges are pairs of rows with a product above a threshold.

    Args:
        units: [N, d] float16, on the device to compute on.
        threshold: edges have larger products.

    Returns:
        For each row, the least row of its component.
    """
    label = torch.arange(len(units), device=units.device)
    blocks = label.split(BLOCK)
    for i, rows in enumerate(blocks):
        mine = units[rows].float()
        for others in blocks[i:]:
            first, second = (mine @ units[others].float().T > threshold).nonzero(as_tuple=True)
            label = joined(label, rows[first], others[second])
    return label


def joined(label: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Components after some edges were added, by propagation of the least label with pointer jumping.

    Args:
        label: [N] the least row of each row's component.
        first: [E] one end of each edge.
        second: [E] the other end.
    """
    while True:
        a, b = label[first], label[second]
        differ = a != b
        if not differ.any():
            return label
        first, second, a, b = (side[differ] for side in (first, second, a, b))
        label = label.scatter_reduce(0, a.maximum(b), a.minimum(b), "amin")
        while not torch.equal(label, jumped := label[label]):
            label = jumped
