"""Probabilities of misalignment: a maximum of the presence-only likelihood, calibrated, and right about how many there are."""

import pytest
import torch

from ecif.columns.misalignment import learn_misalignment
from ecif.evaluation import auroc

N = 4000


def mixture(share: float, seed: int = 0):
    """Evidence of real pairs, which of them are bad, and evidence of planted swaps: three numbers a pair, with outliers."""
    g = torch.Generator().manual_seed(seed)
    bad = torch.rand(N, generator=g) < share
    shift = torch.tensor([2.0, -1.5, -1.0])
    real = torch.randn(N, 3, generator=g) + bad[:, None] * shift
    planted = torch.randn(N, 3, generator=g) + shift
    real[:3] *= 1e4
    return real, bad, planted


def log_likelihood(weights: torch.Tensor, share: torch.Tensor, z: torch.Tensor, planted: torch.Tensor) -> torch.Tensor:
    """Of planted and real pairs, up to a constant, where p_planted / p_good = exp(w . z + c) and c makes it a density.

    Which side a pair came from, given its evidence: p_good, whatever it is, drops out.
    """
    odds = z @ weights[:-1] + weights[-1]
    of_planted = planted @ weights[:-1] + weights[-1]
    n, m = len(z), len(planted)
    # p(real or planted | z): real pairs have density (1 - share) + share e^odds, planted ones e^odds, times p_good.
    rest = lambda o: torch.logaddexp((n * (1 - share)).log(), (n * share + m).log() + o)  # noqa: E731
    real = torch.logaddexp((1 - share).log(), share.log() + odds) - rest(odds)
    return real.sum() + (of_planted - rest(of_planted)).sum()


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_the_share_is_found_and_probabilities_are_calibrated(share):
    real, bad, planted = mixture(share)
    model = learn_misalignment(real, planted)
    probability = model.probability(real)
    assert model.share.item() == pytest.approx(bad.double().mean().item(), abs=0.02)
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.7), (0.7, 0.9), (0.9, 1.0)):
        inside = (probability >= low) & (probability <= high)
        of_them = bad[inside].double().mean().item()
        # Three standard errors of the share among so many.
        allowed = 3 * (0.25 / inside.sum().item()) ** 0.5
        assert of_them == pytest.approx(probability[inside].mean().item(), abs=min(allowed, 0.1))


def test_it_ranks_as_well_as_one_who_knows_which_are_bad():
    real, bad, planted = mixture(0.2)
    ideal = real[3:] @ torch.tensor([2.0, -1.5, -1.0])
    assert auroc(learn_misalignment(real, planted).probability(real)[3:], bad[3:]) > auroc(ideal, bad[3:]) - 0.002


def test_it_is_a_maximum_of_the_likelihood():
    real, _, planted = mixture(0.2)
    model = learn_misalignment(real, planted)
    z, of_planted = model.standardise(real), model.standardise(planted)
    shift = torch.zeros_like(model.weights)
    shift[-1] = (model.share / (1 - model.share)).log()
    at = log_likelihood(model.weights - shift, model.share, z, of_planted)
    for i in range(len(shift) + 1):
        for step in (-0.1, 0.1):
            moved = model.weights - shift
            share = model.share.clone()
            if i < len(shift):
                moved = moved + step * torch.eye(len(shift), dtype=torch.float64)[i]
            else:
                share = share + step * 0.2
            assert log_likelihood(moved, share, z, of_planted) < at


def test_a_corpus_without_bad_pairs_has_next_to_none():
    real, _, planted = mixture(0.0)
    model = learn_misalignment(real, planted)
    assert model.share < 0.01
    assert (model.probability(real)[3:] < 0.5).all()


def test_outliers_stay_distinct_and_finite():
    real, _, planted = mixture(0.2)
    far = torch.tensor([[1e3, 0.0, 0.0], [1e4, 0.0, 0.0], [1e30, 0.0, 0.0], [-1e30, 0.0, 0.0]])
    found = learn_misalignment(real, planted).probability(far)
    assert found.isfinite().all()
    assert (found[:-1].diff() >= 0).all()
    assert found[3] < 0.01 < found[0]


def test_evidence_that_is_constant_says_nothing():
    real, _, planted = mixture(0.2)
    same = torch.ones(N, 1)
    with_it = learn_misalignment(torch.cat([real, same], 1), torch.cat([planted, same], 1))
    assert torch.allclose(
        with_it.probability(torch.cat([real, same], 1)), learn_misalignment(real, planted).probability(real), atol=1e-6
    )


def test_evidence_that_is_not_finite_is_an_error():
    real, _, planted = mixture(0.2)
    real[5, 1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        learn_misalignment(real, planted)


def corpora(separation: float, share: float, pairs: int = 3000, seed: int = 0):
    """Evidence of real pairs, a share of which is drawn as swaps are, and of planted swaps."""
    g = torch.Generator().manual_seed(seed)
    bad = torch.rand(pairs, 1, generator=g) < share
    real = torch.randn(pairs, 3, generator=g) + separation * bad
    return real, torch.randn(pairs, 3, generator=g) + separation


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.4, 0.7])
@pytest.mark.parametrize("separation", [1.5, 2.5])
def test_a_share_that_is_known_is_right_and_in_its_interval(share, separation):
    found = learn_misalignment(*corpora(separation, share))
    low, high = found.interval
    assert low - 0.01 <= share <= high
    assert share - 0.13 < low
    assert high < share + 0.26
    assert found.known_share == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_that_rests_on_no_separation_is_unknown(share):
    found = learn_misalignment(*corpora(0.0, share))
    assert found.known_share is None
    assert found.interval[0] == 0
    assert found.interval[1] > 0.8


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("separation", [0.0, 0.5, 1.0, 2.0])
def test_the_bound_is_a_bound(share, separation):
    for seed in range(3):
        found = learn_misalignment(*corpora(separation, share, seed=seed))
        assert found.bound[1].item() >= share - 0.02
        assert found.interval[1] >= share - 0.02


def test_noise_that_is_milder_than_swaps_is_in_the_interval_if_not_in_the_share():
    real, planted = corpora(2.5, 0.2)
    wrong = real.mean(1) > 1.25  # nearly all of those that are shifted
    real[wrong] -= 2.5 * 0.12
    found = learn_misalignment(real, planted)
    assert found.share < 0.19
    assert found.interval[0] <= wrong.double().mean().item() <= found.interval[1]


def test_a_share_that_one_kind_of_evidence_contradicts_is_unknown():
    """Half of the corpus is as bad as swaps by one kind of evidence, and not bad at all by the other two."""
    real, planted = corpora(2.5, 0.0)
    real[::2, 0] += 2.5
    found = learn_misalignment(real, planted)
    assert found.share < 0.1
    assert found.known_share is None
    assert found.interval[1] > 0.4


@pytest.mark.parametrize(("separation", "share"), [(2.0, 0.1), (2.0, 0.4), (0.8, 0.2)])
def test_the_error_of_the_share_is_how_much_it_varies(separation, share):
    """From one corpus to another of the same kind; most of it is how many of its pairs happen to be wrong."""
    found = [learn_misalignment(*corpora(separation, share, seed=seed)) for seed in range(12)]
    truth = torch.stack([of.share for of in found]).std().item()
    assert torch.stack([of.error for of in found]).mean().item() == pytest.approx(truth, rel=0.5)


def test_copies_that_share_a_fold_make_the_error_larger():
    """Ten copies of every pair say no more than one."""
    real, planted = corpora(2.0, 0.2, 300)
    fold = (torch.arange(300) % 5).repeat_interleave(10)
    copies = real.repeat_interleave(10, 0), planted.repeat_interleave(10, 0)
    assert learn_misalignment(*copies, fold, fold).error > 2 * learn_misalignment(*copies).error


def test_where_the_iteration_contradicts_the_bound_the_share_is_unknown():
    found = learn_misalignment(*corpora(1.5, 0.2))
    assert found._replace(share=torch.tensor(0.0)).known_share is None
    assert found._replace(share=torch.tensor(0.7)).known_share is None


@pytest.mark.parametrize("shift", [[0.6, 0.6], [0.8, 0.5], [0.7]])
def test_weak_evidence_of_a_clean_corpus_is_iterated_to_its_end(shift):
    """After 200 plain steps the share of the first one is still 3 %."""
    g = torch.Generator().manual_seed(1)
    real, planted = (torch.randn(20_000, len(shift), generator=g) for _ in range(2))
    found = learn_misalignment(real, planted + torch.tensor(shift))
    assert found.share < 0.005


def test_a_weakly_seen_majority_is_found_or_unknown():
    g = torch.Generator().manual_seed(1)
    bad = torch.rand(3000, 1, generator=g) < 0.6
    real, planted = torch.randn(3000, 1, generator=g) + bad, torch.randn(3000, 1, generator=g) + 1
    found = learn_misalignment(real, planted)
    assert found.known_share in (None, pytest.approx(0.6, abs=0.1))
    assert found.interval[0] < 0.6 < found.interval[1]


def test_one_fold_tells_no_error():
    real, planted = corpora(2.0, 0.2)
    alike = torch.zeros(len(real), dtype=torch.int16)
    assert learn_misalignment(real, planted, alike, alike).interval[0] == 0
