"""Corpora of drawings with swapped captions, solved in memory.

Every corpus has a target by an artist who drew nothing of it, and a test set by another one.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.permutation import permutation
from ecif.targets import Contrastive
from tests.benchmarks.support.drawings import CLIP_ART, Drawings, drawings
from tests.benchmarks.support.in_memory import Solved, solve

EMOJI, TARGET, TEST = ("noto", "noto-v1", "twemoji"), "fluent-emoji-flat", "emojione"
MIXTURE = ("noto", "twemoji", "openmoji")
ICONS = ("icon-park", "streamline-ultimate-color", "streamline-kameleon-color", "flat-color-icons", "streamline-emojis")
CORPORA = {  # family, and the share of the captions that are swapped
    "emoji-0": ("emoji", 0.0),
    "emoji-10": ("emoji", 0.1),
    "emoji-20": ("emoji", 0.2),
    "emoji-30": ("emoji", 0.3),
    "emoji-40": ("emoji", 0.4),
    "mixture-60": ("mixture 60", 0.2),  # the target has 60 % of the names
    "mixture-33": ("mixture 33", 0.2),
    "icons-20": ("icons", 0.2),  # another domain than the target
    "icons-0": ("icons", 0.0),
    "clip-art-0": ("clip art", 0.0),  # whose titles are bad by themselves
    "clip-art-20": ("clip art", 0.2),
    "random": ("emoji", 1.0),  # what any corpus is to a random model
}
# Where nothing is swapped, or everything, seeds are alike.
CASES = [(name, seed) for name, (_, noise) in CORPORA.items() for seed in range(3 if 0 < noise < 1 else 1)]


class Setting(NamedTuple):
    """Rows of the drawings, and the caption that each pair of the corpus has."""

    corpus: list[int]
    captions: list[int]
    target: list[int]
    test: list[int]
    uncovered: Tensor  # [test] bool: the target has no such name


class Corpus(NamedTuple):
    """A corpus in the order of its batches, and everything that was found out about it."""

    drawings: Drawings
    setting: Setting
    found: Solved
    wrong: Tensor  # [N] bool

    @property
    def tests(self) -> list[tuple[Tensor, Tensor]]:
        """Features of the test set, and of its pairs with names that the target lacks, if there are enough of both kinds."""
        every, uncovered = torch.tensor(self.setting.test), self.setting.uncovered
        parts = [every, every[uncovered]] if 1 < uncovered.sum() < len(every) else [every]
        return [(self.drawings.images[rows].float(), self.drawings.texts[rows].float()) for rows in parts]


def solved(name: str, seed: int) -> Corpus:
    """What a run finds out about one of CORPORA."""
    of = all_drawings(*([CLIP_ART] if name.startswith("clip-art") else []))
    s = setting(of, *CORPORA[name], seed)
    asked = Contrastive(of.images[s.target].float(), of.texts[s.target].float())
    found = solve(of.images[s.corpus], of.texts[s.captions], [str(row) for row in s.corpus], of.heads, asked)
    wrong = torch.tensor([of.names[a] != of.names[b] for a, b in zip(s.corpus, s.captions, strict=True)])[found.rows]
    return Corpus(of, s, found, wrong)


@cache
def all_drawings(*more: str) -> Drawings:
    """The drawings, read once."""
    return drawings(*more)


def setting(of: Drawings, family: str, noise: float, seed: int) -> Setting:
    """A corpus with a share of its captions swapped."""
    by = {artist: {of.names[row]: row for row in of.of(artist)} for artist in set(of.artists)}
    if family == "emoji":
        names = _some(set.intersection(*(set(by[artist]) for artist in (*EMOJI, TARGET, TEST))), 690, "names")
        corpus, target, test = [by[a][n] for a in EMOJI for n in sorted(names)], names, names
    elif family.startswith("mixture"):  # with the percentage of names that the target has
        corpus = [row for artist in MIXTURE for row in by[artist].values()]
        names = {of.names[row] for row in corpus}
        target, test = _some(names, int(family[-2:]) * len(names) // 100, "target"), names
    else:
        artists = ICONS if family == "icons" else (CLIP_ART,)
        corpus = [row for artist in artists for row in of.of(artist)]
        target = _some(set(by[TARGET]), 800, "target")
        test = set(by[TEST]) - target
    order = [corpus[i] for i in permutation(len(corpus), "order").tolist()]
    captions, swapped = list(order), permutation(len(order), "swap", seed).tolist()[: round(noise * len(order))]
    for a, b in zip(swapped, swapped[1:] + swapped[:1], strict=True):
        captions[a] = order[b]
    tested = [by[TEST][n] for n in sorted(test & set(by[TEST]))]
    asked = [by[TARGET][n] for n in sorted(target & set(by[TARGET]))]
    return Setting(order, captions, asked, tested, torch.tensor([of.names[row] not in target for row in tested]))


def _some(names: set[str], count: int, purpose: str) -> set[str]:
    ordered = sorted(names)
    return {ordered[i] for i in permutation(len(ordered), purpose).tolist()[:count]}
