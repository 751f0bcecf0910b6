"""Kinds of noise in a corpus of drawings: what happens to a caption, or to an image, of some pairs."""

import hashlib
import json
import tarfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecif.permutation import permutation
from tests.benchmarks.support.drawings import Drawings, npm_pack

BOILERPLATE = (
    "image may contain text",
    "stock illustration",
    "click to enlarge",
    "part of the flat icon collection",
    "untitled design",
)
CLDR = "cldr-annotations-full@48.0.0"  # names of emoji in many languages
FOREIGN = ("de", "fi", "tr", "vi")
COPIES = 19  # of one wrong pair


class Noisy(NamedTuple):
    """A corpus with noise. `kind` says what is wrong with each pair; empty if nothing is."""

    images: Tensor  # [N, d_x] float16
    texts: Tensor  # [N, d_t] float16
    kind: list[str]
    uids: list[str]

    def of(self, kind: str) -> Tensor:
        """[N] bool: the pairs with one kind of noise."""
        return torch.tensor([one == kind for one in self.kind])


Embed = Callable[[list[str]], Tensor]  # captions -> [N, d_t] unit text features


def clean(drawings: Drawings, rows: list[int]) -> Noisy:
    """Pairs as they are, in a seeded order."""
    rows = [rows[i] for i in permutation(len(rows), "order").tolist()]
    return Noisy(drawings.images[rows], drawings.texts[rows], [""] * len(rows), [str(row) for row in rows])


def add(noisy: Noisy, names: list[str], kind: str, share: float, seed: int, embed: Embed) -> Noisy:
    """The corpus with one more kind of noise.

    Args:
        noisy: the corpus.
        names: the true caption of each pair.
        kind: one of KINDS.
        share: of all pairs, taken from those without noise.
        seed: of the choice of these pairs.
        embed: embeds captions that no pair has.
    """
    free = [row for row in permutation(len(names), kind, seed).tolist() if not noisy.kind[row]]
    chosen = free[: round(share * len(names))]
    texts, label = noisy.texts.clone(), list(noisy.kind)
    new = KINDS[kind](noisy, names, chosen, embed)
    for row, caption in zip(chosen, new, strict=True):
        if caption is not None:
            texts[row], label[row] = caption, kind
    return noisy._replace(texts=texts, kind=label)


def add_copies(noisy: Noisy, names: list[str], wrong: bool, count: int, seed: int) -> Noisy:
    """The corpus with near-copies: of some pairs, COPIES more with hardly another image and the same caption.

    A near-copy is the image's features with noise, at cosine 0.97: what crops and other compression of a drawing give.
    """
    free = [row for row in permutation(len(names), "copies", wrong, seed).tolist() if not noisy.kind[row]]
    texts, label, kind = noisy.texts.clone(), list(noisy.kind), f"near-copies of {'wrong' if wrong else 'right'} pairs"
    generator = torch.Generator().manual_seed(seed)
    images, captions, uids = [noisy.images], [], list(noisy.uids)
    for row, other in zip(free[:count], free[count : 2 * count], strict=True):
        if wrong:
            texts[row], label[row] = noisy.texts[other], kind
        jitter = normalize(torch.randn(COPIES, noisy.images.shape[1], generator=generator), dim=1)
        images.append(normalize(noisy.images[row].float() + 0.25 * jitter, dim=1).half())
        captions.append(texts[row].repeat(COPIES, 1))
        label += [kind if wrong else ""] * COPIES
        uids += [hashlib.sha256(f"{row} {i}".encode()).hexdigest()[:32] for i in range(COPIES)]
    return Noisy(torch.cat(images), torch.cat([texts, *captions]), label, uids)


def _swapped(noisy: Noisy, names: list[str], rows: list[int], embed: Embed) -> list[Tensor | None]:
    partner = rows[1:] + rows[:1]
    return [noisy.texts[b] if names[a] != names[b] else None for a, b in zip(rows, partner, strict=True)]


def _near(noisy: Noisy, names: list[str], rows: list[int], embed: Embed) -> list[Tensor | None]:
    """The caption among the ten nearest other ones: a mistake within a concept."""
    distinct = {name: i for i, name in enumerate(names)}
    among = normalize(noisy.texts[list(distinct.values())].float() - noisy.texts.float().mean(0), dim=1)
    known, found = list(distinct), list[Tensor | None]()
    place = {name: i for i, name in enumerate(known)}
    for row in rows:
        nearest = (among @ among[place[names[row]]]).topk(11).indices.tolist()
        others = [i for i in nearest if known[i] != names[row]]
        found.append(noisy.texts[distinct[known[others[row % len(others)]]]])
    return found


def _noun(noisy: Noisy, names: list[str], rows: list[int], embed: Embed) -> list[Tensor | None]:
    """A caption that ends in the same word."""
    by: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        by.setdefault(name.split()[-1], []).append(row)
    found = list[Tensor | None]()
    for row in rows:
        others = [other for other in by[names[row].split()[-1]] if names[other] != names[row]]
        found.append(noisy.texts[others[row % len(others)]] if others else None)
    return found


def _truncated(noisy: Noisy, names: list[str], rows: list[int], embed: Embed) -> list[Tensor | None]:
    """The first word of the caption, without its last letters."""
    texts = embed([name.split()[0][:4] for name in (names[row] for row in rows)]).half()
    return list(texts)


def _boilerplate(noisy: Noisy, names: list[str], rows: list[int], embed: Embed) -> list[Tensor | None]:
    known = embed(list(BOILERPLATE)).half()
    return [known[row % len(BOILERPLATE)] for row in rows]


def _foreign(noisy: Noisy, names: list[str], rows: list[int], embed: Embed) -> list[Tensor | None]:
    """The right caption in another language, where it is known."""
    words = _translations()
    said = [words.get(names[row]) for row in rows]
    known = [one for one in said if one]
    texts = iter(embed([one[i % len(one)] for i, one in enumerate(known)]).half() if known else ())
    return [next(texts) if one else None for one in said]


def _translations() -> dict[str, list[str]]:
    """For each English name of an emoji, its names in FOREIGN."""
    names: dict[str, dict[str, str]] = {}
    with tarfile.open(npm_pack(CLDR)) as tar:
        for language in ("en", *FOREIGN):
            data = json.load(tar.extractfile(f"package/annotations/{language}/annotations.json"))  # type: ignore[arg-type]
            for emoji, of in data["annotations"]["annotations"].items():
                names.setdefault(emoji, {})[language] = of["tts"][0]
    found = {}
    for of in names.values():
        if "en" in of and (others := [of[language] for language in FOREIGN if language in of]):
            found["".join(c if c.isalnum() or c == " " else " " for c in of["en"]).lower().replace("  ", " ").strip()] = others
    return found


KINDS: dict[str, Callable[[Noisy, list[str], list[int], Embed], list[Tensor | None]]] = {
    "swap": _swapped,
    "caption of a near neighbour": _near,
    "caption with the same noun": _noun,
    "truncated": _truncated,
    "boilerplate": _boilerplate,
    "foreign": _foreign,
}
