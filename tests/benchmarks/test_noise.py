"""Every kind of noise: how well is it found, how much of it does the run expect, and what does dropping just that kind gain?

    pytest tests/benchmarks/test_noise.py -m benchmark -s -k mixture-0   # two minutes
    make results                                                         # each kind by itself, at two rates, three seeds

Emoji of three artists, the target by a fourth, the test by a fifth (`tests.benchmarks.support.drawings`).
"""

from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from ecif.columns import HeldOutPairs, Lemon
from ecif.columns.bank import build_bank
from ecif.evaluation import auroc
from ecif.heads.cross_fit import Refit
from ecif.losses import CLIP
from ecif.targets import Contrastive
from ecif.towers import load
from tests.benchmarks.support.comparison import assert_it_never_loses, compare, expected
from tests.benchmarks.support.corpora import EMOJI, TARGET, TEST, all_drawings, setting
from tests.benchmarks.support.drawings import CACHE, Drawings
from tests.benchmarks.support.in_memory import Solved, solve
from tests.benchmarks.support.noise import KINDS, Noisy, add, add_copies, clean
from tests.benchmarks.support.results import record

pytestmark = [pytest.mark.benchmark, pytest.mark.network]
MIXTURE = {"swap": 0.05, "caption of a near neighbour": 0.03, "caption with the same noun": 0.03, "truncated": 0.03}
MIXTURE |= {"boilerplate": 0.03, "foreign": 0.03}
VISIBLE = ("swap", "boilerplate", "foreign", "near-copies of wrong pairs")


class World:
    """The drawings of names that all five artists have."""

    def __init__(self, all_of: Drawings, embed: Callable[[list[str]], Tensor]):
        self.drawings, self.embed = all_of, embed
        names = {all_of.names[row] for row in setting(all_of, "emoji", 0.0, 0).test}
        self.rows = {artist: [row for row in all_of.of(artist) if all_of.names[row] in names] for artist in set(all_of.artists)}
        self.corpus = clean(all_of, [row for artist in EMOJI for row in self.rows[artist]])
        self.captions = [all_of.names[int(uid)] for uid in self.corpus.uids]

    def features(self, artist: str) -> tuple[Tensor, Tensor]:
        return self.drawings.images[self.rows[artist]].float(), self.drawings.texts[self.rows[artist]].float()


@pytest.fixture(scope="module")
def world(one_thread):
    return World(all_drawings(), load(f"local-dir:{(CACHE / 'model').resolve()}").text_features)


def scores(found: Solved) -> dict[str, Tensor]:
    """What pairs are ranked by, high for wrong ones. LEMoN gets heads fitted without the fold, as the model's are random."""
    _, cosine, _, agreement = found.evidence.real
    fold, lemon = found.sample.fold, torch.zeros(len(cosine))
    features = found.sample.images.float(), found.sample.texts.float(), fold
    folds = fold.unique()
    for one, heads in zip(folds, found.refit([Refit(fold != one, 0) for one in folds]), strict=True):
        values = Lemon().values(HeldOutPairs(*features, [], heads, [], CLIP, build_bank(*features, heads)))
        lemon[fold == one] = values[fold == one]
    return {"held_out_cosine": -cosine, "agreement": -agreement, "lemon": lemon, "misalignment": found.probability}


def solve_noisy(world: World, noisy: Noisy) -> tuple[Solved, dict[str, Tensor]]:
    """What a run finds out, and which of its pairs [N] have each kind of noise; the kind of those without is empty."""
    found = solve(noisy.images, noisy.texts, noisy.uids, world.drawings.heads, Contrastive(*world.features(TARGET)))
    return found, {kind: noisy.of(kind)[found.rows] for kind in sorted(set(noisy.kind))}


def show(found: Solved, of_kind: dict[str, Tensor], test: tuple[Tensor, Tensor], title: str, seed: int) -> dict[str, float]:
    """Print and record how well each kind is found among pairs without noise; returns the AUROC of `misalignment` by kind."""
    everything = found.test_loss(torch.ones_like(of_kind[""]), *test, seeds=2)
    areas, ranks = {}, scores(found)
    for kind, bad in of_kind.items():
        if not kind:
            continue
        among = of_kind[""] | bad
        ranked = {name: auroc(values[among], bad[among]) for name, values in ranks.items()}
        precision = average_precision_score(bad[among].numpy(), found.probability[among].numpy())
        gain = everything - found.test_loss(~bad, *test, seeds=2)
        share = bad.double().mean().item()
        shown = ", ".join(f"{name} {area:.3f}" for name, area in ranked.items())
        print(f"  {kind:28s} {share:5.1%}  AUROC {shown}; AP {precision:.2f}; dropping it gains {gain:+.3f}", flush=True)
        measured = {"auroc": ranked, "precision": precision, "gain": gain, "share": share}
        record("kinds", f"{title} {kind} {seed}", name=f"{title} {kind}", kind=kind, corpus=title.partition(",")[0], **measured)
        areas[kind] = ranked["misalignment"]
    return areas


@pytest.mark.parametrize("seed", range(3), ids=lambda seed: f"mixture-{seed}")
def test_a_mixture_of_every_kind(world, seed):
    noisy = world.corpus
    for kind, share in MIXTURE.items():
        noisy = add(noisy, world.captions, kind, share, seed, world.embed)
    noisy = add_copies(add_copies(noisy, world.captions, True, 8, seed), world.captions, False, 8, seed)
    found, of_kind = solve_noisy(world, noisy)
    visible = torch.stack([of_kind[kind] for kind in VISIBLE]).any(0)
    record("mixtures", f"mixture {seed}", corpus="mixture", **expected("mixture", seed, found, visible))
    compared = compare(found, ~of_kind[""], [world.features(TEST)])
    record("filters", f"seven kinds of noise {seed}", corpus="seven kinds of noise", **compared)
    areas = show(found, of_kind, world.features(TEST), "mixture", seed)
    assert areas["near-copies of wrong pairs"] > 0.8
    assert areas["swap"] > 0.9
    assert_it_never_loses(compared["losses"])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_by_itself(world, kind, share, seed):
    title = f"{kind}, {share:.0%}"
    found, of_kind = solve_noisy(world, add(world.corpus, world.captions, kind, share, seed, world.embed))
    record("mixtures", f"{title} {seed}", corpus=title, **expected(title, seed, found, of_kind[kind]))
    areas = show(found, of_kind, world.features(TEST), title, seed)
    assert kind != "swap" or areas[kind] > 0.9
