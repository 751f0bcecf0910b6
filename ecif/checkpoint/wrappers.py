"""Where in a file the weights are: trainers and compilers put them into dictionaries, and put words before their names."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import Tensor

# Words that wrappers put into a name: torch.compile, FSDP, activation checkpointing. They may stand anywhere.
INSIDE = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Words that wrappers put before all names, and dictionaries that hold the weights: DDP, DeepSpeed, Lightning, trainers.
WRAPPERS = {"module", "model", "clip", "clip_model", "net", "network", "_forward_module", "state_dict", "model_state_dict"}
WRAPPERS |= {"weights", "params", "model_state", "model_weights", "checkpoint", "ckpt", "pytorch-lightning_module"}
# Words of running means of the weights, which some trainers keep beside them.
MEANS = re.compile(r"ema|averag|swa|shadow|polyak", re.IGNORECASE)
DEPTH = 4  # dictionaries within each other


class Found(NamedTuple):
    """Weights that were found in a file."""

    place: str  # the dictionaries and the words before the names, such as `state_dict.module.`; empty for a bare state dict
    tensors: dict[str, Tensor]
    beside: list[str]  # other places with weights of this model, which are not taken
    left: list[str]  # tensors under other names in the same dictionary


class _Candidate(NamedTuple):
    words: list[str]  # dictionaries, then words before the names
    tensors: dict[str, Tensor]
    left: list[str]
    known: int  # names of the model's

    @property
    def place(self) -> str:
        return "".join(f"{word}." for word in self.words)

    @property
    def rank(self) -> tuple[int, bool, int]:
        """The most names first, then weights before running means, then wrappers that are known."""
        mean = any(MEANS.search(word) for word in self.words)
        return -self.known, mean, sum(word not in WRAPPERS for word in self.words)


def find(tree: Any, names: Collection[str]) -> Found | None:
    """The weights in a file, by the model's names.

    Of several weights in one file those are taken that have most of the model's names. Of equals, trained weights are taken
    before running means (EMA) of them, then the ones under words that are known above.

    Args:
        tree: nested dictionaries with tensors.
        names: of the model's tensors.

    Returns:
        None if no tensor has a name of the model's.

    Raises:
        ValueError: several weights are equally good; the text names their places.
    """
    candidates = sorted(_candidates(tree, set(names)), key=lambda candidate: candidate.rank)
    if not candidates:
        return None
    best = candidates[0]
    rivals = [other for other in candidates[1:] if other.known >= 0.9 * best.known]
    same = [other for other in rivals if other.rank == best.rank and best.rank[2]]
    if same:
        raise ValueError(", ".join(repr(candidate.place) for candidate in [best, *same]))
    return Found(best.place, best.tensors, [other.place for other in rivals], best.left)


def _candidates(tree: Any, names: set[str]) -> Iterator[_Candidate]:
    for path, tensors in _dictionaries(tree, []):
        plain = {INSIDE.sub("", name): tensor for name, tensor in tensors.items()}
        prefixes = Counter(prefix for name in plain for prefix in _prefixes(name, names))
        for prefix, known in prefixes.items():
            inside = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
            left = [name for name in plain if not name.startswith(prefix)]
            yield _Candidate([*path, *prefix.split(".")[:-1]], inside, left, known)


def _prefixes(name: str, names: set[str]) -> Iterator[str]:
    """What stands before a name of the model's."""
    words = name.split(".")
    for i in range(len(words)):
        if ".".join(words[i:]) in names:
            yield "".join(f"{word}." for word in words[:i])


def _dictionaries(tree: Any, path: list[str]) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Every dictionary with tensors, and the keys or places in lists that lead to it."""
    if len(path) > DEPTH:
        return
    inside = dict(enumerate(tree)) if isinstance(tree, list | tuple) else tree
    if not isinstance(inside, dict):
        return
    tensors = {name: value for name, value in inside.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in inside.items():
        yield from _dictionaries(value, [*path, str(key)])
