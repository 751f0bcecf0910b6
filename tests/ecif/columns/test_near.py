"""How near a pair's caption is to a target, and how much of a corpus a target asks about."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from ecif.columns.near import CHUNK, asked_share, nearness

G = torch.Generator().manual_seed(0)
CENTRE = torch.randn(5, generator=G)
ASKED = CENTRE + torch.randn(7, 5, generator=G)


def captions(count: int) -> torch.Tensor:
    return CENTRE + torch.randn(count, 5, generator=G)


@pytest.mark.parametrize("count", [1, 9, CHUNK + 3])
def test_it_is_the_cosine_with_the_nearest_of_the_targets_captions_after_centring(count):
    of = captions(count)
    truth = [max(cosine_similarity(c - CENTRE, t - CENTRE, dim=0).item() for t in ASKED) for c in of[:50]]
    assert nearness(of, ASKED, CENTRE)[:50].tolist() == pytest.approx(truth, abs=1 / 2048 + 1e-5)


def test_a_pair_counts_as_asked_about_if_the_target_is_as_near_as_the_nearest_other_caption():
    corpus = captions(60)
    corpus[40:] = corpus[:20]  # pairs that share a caption
    count = 0
    for caption in corpus:
        others = [c for c in corpus[:40] if not torch.equal(c, caption)]
        nearest = max(cosine_similarity(caption - CENTRE, c - CENTRE, dim=0).item() for c in others)
        count += max(cosine_similarity(caption - CENTRE, t - CENTRE, dim=0).item() for t in ASKED) >= nearest
    assert asked_share(corpus, ASKED, CENTRE, corpus[:40]) == count / 60


def test_a_target_with_every_caption_asks_about_everything_and_one_that_is_far_away_about_nothing():
    corpus = captions(50)
    assert asked_share(corpus, corpus, CENTRE, corpus) == 1
    away = CENTRE - 5 * (corpus - CENTRE).mean(0, keepdim=True)
    assert asked_share(corpus, away, CENTRE, corpus) < 0.2


def test_pairs_with_a_caption_of_the_target_are_all_equally_near():
    """Rounding must not tell them apart."""
    corpus = captions(700)
    assert nearness(corpus, corpus.flip(0), CENTRE).unique().tolist() == [1.0]
