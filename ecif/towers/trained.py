"""How the weights of an architecture were trained: their preprocessing of images, and their activation.

open_clip keeps both in a table by architecture and tag, and no checkpoint file has them. The activation is QuickGELU where the
name of the architecture or the tag says so.
"""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ecif.checkpoint import ModelError

DEFAULT = "default"  # the tag for weights of one's own: what open_clip trains with unless told otherwise
KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")  # of a preprocessing
SHOWN = 6  # tags of a kind that an error lists


class Trained(NamedTuple):
    """What weights were trained with."""

    preprocess: dict[str, Any]  # the KEYS of open_clip's preprocessing configuration
    quick_gelu: bool

    def says(self, others: list["Trained"]) -> str:
        """What tells it from others, for people."""
        own = self.preprocess | {"activation": activation(self.quick_gelu)}
        differ = [
            key
            for key, value in own.items()
            if any((other.preprocess | {"activation": activation(other.quick_gelu)})[key] != value for other in others)
        ]
        return ", ".join(f"{key} {_text(own[key])}" for key in differ)


def activation(quick_gelu: bool) -> str:
    """The name of an activation."""
    return "QuickGELU" if quick_gelu else "GELU"


def how_trained(
    name: str, architecture: dict[str, Any], tag: str | None, preprocess: Mapping[str, Any], own: bool = False
) -> tuple[Trained, list[str]]:
    """The preprocessing and the activation of an architecture's weights, and a line about what was assumed, if anything.

    Args:
        name: an architecture of open_clip.
        architecture: its configuration.
        tag: one of the architecture's pretrained tags, or `default`. None if nothing is known.
        preprocess: KEYS that are known by themselves.
        own: the weights are of a training under this name: if only the activation is open, it is the one of the name.

    Raises:
        ModelError: there is no such tag; or no tag is given, and what the architecture's tags and open_clip's default say
            differs in more than `preprocess` and `own` decide.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    table = {DEFAULT: {}} | {known: open_clip.get_pretrained_cfg(name, known) for known in tags}
    if tag is not None:
        known = tag.lower().replace("-", "_")  # as open_clip compares them
        if known not in table:
            raise ModelError(f"model.pretrained_cfg: {name} has no tag {tag!r}: {_nearest(known, list(table))}")
        return _trained(table[known], architecture, preprocess), []
    kinds = list[tuple[Trained, list[str]]]()
    for known, of_tag in table.items():
        trained = _trained(of_tag, architecture, preprocess)
        same = next((names for kind, names in kinds if kind == trained), None)
        kinds.append((trained, [known])) if same is None else same.append(known)
    every = [kind for kind, _ in kinds]
    if len(every) == 1:
        return every[0], []
    if own and all(kind.preprocess == every[0].preprocess for kind in every):
        assumed = f"a checkpoint of your own training, taken to have the {activation(every[0].quick_gelu)} of its name"
        return every[0], [
            f"{name}: {assumed}; if it began from weights of another activation, say model.pretrained_cfg: THEIR TAG"
        ]
    choices = "; ".join(f"{_listed(names)} ({kind.says(every)})" for kind, names in kinds)
    raise ModelError(
        f"how the weights of {name} were trained is not in their file, and open_clip knows several ways: {choices}. "
        f"Say model.pretrained_cfg: TAG; `{DEFAULT}` is for weights of your own, trained with open_clip's defaults"
    )


def _trained(of_tag: dict[str, Any], architecture: dict[str, Any], preprocess: Mapping[str, Any]) -> Trained:
    from open_clip.transform import PreprocessCfg

    default = PreprocessCfg()
    values = {key: preprocess.get(key, of_tag.get(key, getattr(default, key))) for key in KEYS}
    values |= {key: tuple(map(float, values[key])) for key in ("mean", "std")}
    return Trained(values, bool(architecture.get("quick_gelu") or of_tag.get("quick_gelu")))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {', '.join(near)}?" if near else f"it has {_listed(names)}"


def _text(value: Any) -> str:
    return " ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)
