"""A target's question: its loss, with its pairs dealt into parts and batches."""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.batching import cut
from ecif.components import joined
from ecif.heads import Heads, embed
from ecif.permutation import permutation
from ecif.targets.contract import TargetLoss
from ecif.targets.coverage import coverage

PARTS = 3  # a filter is ranked by all parts but one, and judged by what happens to the one that had no say
FEWEST = 2 * PARTS  # pairs of a target: one that is alone in its part has nothing to be told apart from
CALIBRATION_GROUPS = 8  # calibration predicts the loss of this many parts of a target separately
COVERED_CAPTIONS = 1024  # coverage is measured on this many distinct captions of the corpus


class Question(NamedTuple):
    """A target with its pairs dealt into PARTS parts, and each part into batches."""

    name: str
    loss: TargetLoss
    parts: list[list[Tensor]]  # PARTS lists of batches; a batch is the rows of the target that share a softmax in its loss

    @property
    def batches(self) -> list[Tensor]:
        """The batches of all parts."""
        return [batch for part in self.parts for batch in part]

    @property
    def rows(self) -> list[Tensor]:
        """The rows of the target in each part."""
        return [torch.cat(part) for part in self.parts]

    @property
    def groups(self) -> list[list[Tensor]]:
        """The batches in up to CALIBRATION_GROUPS parts of about the same size."""
        batches = self.batches
        count = min(CALIBRATION_GROUPS, len(batches))
        return [batches[i::count] for i in range(count)]

    def gradient(self, heads: Heads, batches: list[Tensor] | None = None) -> Tensor:
        """Gradient [P] of the loss on some of the target's batches, by default on all.

        Raises:
            ValueError: the gradient is zero, so that no small change of the heads can improve the target.
        """
        found = self.loss.gradient(heads, self.batches if batches is None else batches)
        if not found.any():
            raise ValueError(f"target {self.name}: its loss {self.loss.name} has no gradient, nothing is left to improve")
        return found

    def group_losses(self, heads: Heads) -> Tensor:
        """[G] the loss of each calibration group under some heads."""
        return torch.stack([self.loss.value(heads, group) for group in self.groups])

    def mean_loss(self, heads: Heads, rows: Tensor | None = None) -> float:
        """Mean loss of the pairs at `rows`, by default of all pairs, in one batch; to compare models by."""
        rows = torch.cat(self.batches).sort().values if rows is None else rows
        return self.loss.mean(heads, rows)


def deal(name: str, loss: TargetLoss, batch: int, seed: int, image: Tensor | None = None) -> Question:
    """Deal a target's pairs into parts, and each part into batches.

    Pairs with one caption or of one image go to one part: the part that judges a filter is to know nothing of what ranked it.
    The captions of one image go to different batches, because none of them is wrong for the image.

    Args:
        name: name of the target, part of the permutation's key.
        loss: the loss on its pairs.
        batch: number of pairs that share a softmax. A last batch smaller than half of that joins the one before it.
        seed: of the permutation.
        image: int64 [N], equal for pairs of one image; by default each pair has an image of its own.

    Raises:
        ValueError: there are fewer than FEWEST pairs.
    """
    captions = loss.captions()
    pairs = torch.arange(len(captions))
    if len(pairs) < FEWEST:
        raise ValueError(f"target {name}: {len(pairs)} pairs are too few to ask, it takes at least {FEWEST}")
    image = pairs if image is None else image
    concept = pairs
    for label in (image.unique(return_inverse=True)[1], captions.unique(dim=0, return_inverse=True)[1]):
        first = torch.full_like(pairs, len(pairs)).scatter_reduce(0, label, pairs, "amin")
        concept = joined(concept, pairs, first[label])
    # With fewer than two in each part nothing could be told apart. A target of so few captions has them in several parts.
    unit = next((of for of in (concept, image) if len(of.unique()) >= FEWEST), pairs)
    of_unit = _together(pairs.tolist(), unit)
    order = permutation(len(of_unit), "target", name, seed)
    # Within a part the pairs are shuffled again: equal captions in one batch would be each other's negatives.
    place = permutation(len(pairs), "target pairs", name, seed).argsort()
    dealt = [[pair for i in part.tolist() for pair in of_unit[i]] for part in order.tensor_split(PARTS)]
    shuffled = [sorted(part, key=lambda pair: int(place[pair])) for part in dealt]
    return Question(name, loss, [_batches(_together(part, image), batch) for part in shuffled])


def coverage_of(question: Question, heads: Heads, texts: Tensor, seed: int) -> float:
    """The share, 0 to 1, of the sample's captions that a target covers, see `ecif.targets.coverage`.

    Args:
        question: the target.
        heads: the heads that captions are embedded with.
        texts: [N, d_t] text features of the sample.
        seed: of the choice of COVERED_CAPTIONS distinct captions.
    """
    captions = texts.float().unique(dim=0)
    chosen = captions[permutation(len(captions), "coverage", seed)[:COVERED_CAPTIONS]]
    no_image = heads.image.new_zeros(0, heads.image.shape[0])
    of_corpus, of_target = (embed(heads, no_image, part).u for part in (chosen, question.loss.captions()))
    return coverage(of_corpus, of_target)


def _together(pairs: list[int], label: Tensor) -> list[list[int]]:
    """The pairs with each label, labels in the order of their first pairs."""
    found: dict[int, list[int]] = {}
    for pair in pairs:
        found.setdefault(int(label[pair]), []).append(pair)
    return list(found.values())


def _batches(of_image: list[list[int]], size: int) -> list[Tensor]:
    """Batches of the first caption of every image, then of the second, and so on."""
    batches: list[Tensor] = []
    for number in range(max(map(len, of_image), default=0)):
        rows = torch.tensor([pairs[number] for pairs in of_image if len(pairs) > number])
        if batches and len(rows) < 2:  # alone it would have nothing to be told apart from
            batches[-1] = torch.cat([batches[-1], rows])
        else:
            batches += cut(rows, size)
    return batches
