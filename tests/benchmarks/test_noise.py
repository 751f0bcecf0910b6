"""Every kind of noise: how well is it found, and what does dropping just that kind gain?

    pytest tests/benchmarks/test_noise.py -m benchmark -s -k mixture   # a few minutes
    pytest tests/benchmarks/test_noise.py -m benchmark -s              # each kind by itself, at two rates, three seeds

Emoji of three artists, the target by a fourth, the test by a fifth (`tests.benchmarks.support.drawings`).
"""

from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

import ecif
from ecif.evaluation import auroc, calibrated_loss
from ecif.heads import standardised
from ecif.heads.cross_fit import HowToFit, Hyperparameters, Refit, run_refit
from ecif.losses import CLIP
from ecif.permutation import permutation
from ecif.towers import load
from tests.benchmarks.support.drawings import CACHE, Drawings, drawings
from tests.benchmarks.support.noise import KINDS, Noisy, add, add_copies, clean

pytestmark = [pytest.mark.benchmark, pytest.mark.network]
ARTISTS, TARGET, TEST = ("noto", "noto-v1", "twemoji"), "fluent-emoji-flat", "emojione"
NAMES = 690
SHOWN = ("clip_score", "held_out_cosine", "agreement", "misalignment")
MIXTURE = {"swap": 0.05, "caption of a near neighbour": 0.03, "caption with the same noun": 0.03, "truncated": 0.03}
MIXTURE |= {"boilerplate": 0.03, "foreign": 0.03}
VISIBLE = ("swap", "boilerplate", "foreign", "near-copies of wrong pairs")


class World:
    """The drawings of names that all five artists have."""

    def __init__(self, all_of: Drawings, embed: Callable[[list[str]], Tensor]):
        by = [{all_of.names[row] for row in all_of.of(artist)} for artist in (*ARTISTS, TARGET, TEST)]
        shared = sorted(set.intersection(*by))
        self.names = {shared[i] for i in permutation(len(shared), "names").tolist()[:NAMES]}
        self.drawings, self.embed = all_of, embed
        self.corpus = clean(all_of, self.rows(*ARTISTS))
        self.captions = [all_of.names[int(uid)] for uid in self.corpus.uids]

    def rows(self, *artists: str) -> list[int]:
        return [row for row in self.drawings.of(*artists) if self.drawings.names[row] in self.names]

    def features(self, artist: str) -> tuple[Tensor, Tensor]:
        rows = self.rows(artist)
        return self.drawings.images[rows].float(), self.drawings.texts[rows].float()

    def columns(self, noisy: Noisy) -> dict[str, Tensor]:
        target = {"clean": ecif.Contrastive(*self.features(TARGET))}
        settings = ecif.Settings(filter=False)
        return ecif.attribute(noisy.images, noisy.texts, target, heads=self.drawings.heads, settings=settings, uids=noisy.uids)

    def loss_without(self, noisy: Noisy, dropped: Tensor) -> float:
        """Test loss of heads that were fitted without some pairs."""
        how = HowToFit(standardised(self.drawings.heads), CLIP, 256, Hyperparameters(1e-3, 8, 0.0))
        batches = list(torch.arange(len(noisy.kind)).split(256))
        fits = [run_refit(how, noisy.images, noisy.texts, batches, Refit(~dropped, seed, True))[-1] for seed in range(2)]
        return sum(calibrated_loss(heads, *self.features(TEST)) for heads in fits) / len(fits)


@pytest.fixture(scope="module")
def world(one_thread):
    towers = load(f"local-dir:{(CACHE / 'model').resolve()}")
    return World(drawings(), towers.text_features)


def show(world: World, noisy: Noisy, title: str) -> dict[str, float]:
    """Print how well each kind is found among the pairs without noise; returns the AUROC of `misalignment` by kind."""
    columns, good = world.columns(noisy), noisy.of("")
    everything = world.loss_without(noisy, torch.zeros(len(good), dtype=torch.bool))
    print(f"\n{title}: expects {columns['misalignment'].mean():.1%} misaligned")
    found = {}
    for kind in sorted(set(noisy.kind) - {""}):
        bad = noisy.of(kind)
        among = good | bad
        values = [columns[name][among] * (1 if name == "misalignment" else -1) for name in SHOWN]
        areas = [auroc(value, bad[among]) for value in values]
        precision = average_precision_score(bad[among].numpy(), values[-1].numpy())
        gain = everything - world.loss_without(noisy, bad)
        shown = ", ".join(f"{name} {area:.3f}" for name, area in zip(SHOWN, areas, strict=True))
        print(
            f"  {kind:28s} {bad.double().mean():5.1%}  AUROC {shown}; AP {precision:.2f}; dropping it gains {gain:+.3f}",
            flush=True,
        )
        found[kind] = areas[-1]
    return found


@pytest.mark.parametrize("seed", [0])
def test_a_mixture_of_every_kind(world, seed):
    noisy = world.corpus
    for kind, share in MIXTURE.items():
        noisy = add(noisy, world.captions, kind, share, seed, world.embed)
    noisy = add_copies(add_copies(noisy, world.captions, True, 8, seed), world.captions, False, 8, seed)
    visible = torch.stack([noisy.of(kind) for kind in VISIBLE]).any(0).double().mean()
    found = show(world, noisy, f"mixture, seed {seed}, {visible:.1%} visibly wrong")
    assert found["near-copies of wrong pairs"] > 0.8
    assert found["swap"] > 0.9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_by_itself(world, kind, share, seed):
    noisy = add(world.corpus, world.captions, kind, share, seed, world.embed)
    found = show(world, noisy, f"{kind}, {share:.0%}, seed {seed}")
    assert kind != "swap" or found[kind] > 0.9
