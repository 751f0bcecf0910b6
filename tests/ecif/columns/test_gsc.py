"""Structure consistency against its definition, and what it is for."""

import math

import pytest
import torch

from ecif.columns import Gsc
from tests.support.problems import held_out_pairs


def test_it_is_the_cosine_of_both_rows_of_similarities_mean_over_the_batches():
    pairs = held_out_pairs()
    values = Gsc().values(pairs)
    for n in range(12):
        of_batches = []
        for rows in (rows.tolist() for rows in pairs.batches):
            if n in rows:
                a, b = ([float(side[n] @ side[j]) for j in rows] for side in (pairs.images, pairs.texts))
                norms = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
                of_batches.append(sum(x * y for x, y in zip(a, b, strict=True)) / norms)
        assert values[n].item() == pytest.approx(sum(of_batches) / len(of_batches))


def test_captions_with_the_structure_of_the_images_are_perfect_and_swapped_ones_are_not():
    pairs = held_out_pairs()
    turned = pairs._replace(texts=pairs.images.flip(1))
    assert torch.allclose(Gsc().values(turned), torch.ones(12, dtype=torch.float64))
    swapped = turned._replace(texts=turned.texts.roll(1, 0))
    assert (Gsc().values(swapped) < 1 - 1e-3).all()
