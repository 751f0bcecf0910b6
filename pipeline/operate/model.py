"""What `ecif model` shows: the model as a run would load it, and whether it tells drawn images apart by their captions."""

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from ecif.heads import embed
from ecif.towers import Towers, activation, resize_transform
from pipeline.inputs import load_model
from pipeline.sections import Model
from pipeline.urls import masked

SIDE = 256  # pixels of a drawn image


class Described(NamedTuple):
    """A model for people."""

    facts: dict[str, str]
    warning: str  # empty if right pairs score above wrong ones


def describe(model: Model) -> Described:
    """Load a model and describe it.

    Args:
        model: with one checkpoint.

    Raises:
        UserError: the model can't be loaded.
    """
    towers = load_model(model)
    cosines = check_itself(towers)
    prepared, heads = towers.preprocess, towers.heads
    facts = {
        "architecture": model.name,
        "weights": masked(model.checkpoint or model.name.removeprefix("local-dir:")),
        "images": f"{_size(prepared['size'])}, {prepared['resize_mode']}, {prepared['interpolation']}",
        "mean": _numbers(prepared["mean"]),
        "std": _numbers(prepared["std"]),
        "activation": activation(bool(towers.architecture.get("quick_gelu"))),
        "tokenizer": _tokenizer(towers),
        "context length": str(getattr(towers.tokenizer, "context_length", "of its tokenizer")),
        "logit scale": f"{heads.logit_scale:g}",
        "logit bias": f"{heads.logit_bias:g}",
        "image head": _head(heads.image, towers.image_biased),
        "text head": _head(heads.text, towers.text_biased),
        "fingerprint": towers.fingerprint,
        "self-check": ", ".join(
            f"{caption} {cosines[i][i]:.3f} (wrong: {max(_wrong(cosines, i)):.3f})" for i, caption in enumerate(pairs())
        ),
    }
    return Described(facts, "" if _tells_apart(cosines) else WARNING)


WARNING = (
    "self-check: a right pair does not score above the wrong ones. Either the weights are untrained, or they are not what "
    "model.pretrained_cfg and model.preprocess say"
)


def pairs() -> dict[str, Image.Image]:
    """Drawn images that every trained CLIP tells apart, by their captions. Four, so that chance seldom does."""
    near, middle, far = SIDE // 5, SIDE // 2, SIDE * 4 // 5
    drawn = {
        "a red circle": lambda pen: pen.ellipse((near, near, far, far), fill=(220, 20, 20)),
        "a blue square": lambda pen: pen.rectangle((near, near, far, far), fill=(20, 40, 220)),
        "a green triangle": lambda pen: pen.polygon([(middle, near), (far, far), (near, far)], fill=(20, 160, 40)),
        "a black cross": lambda pen: pen.line(
            [(near, near), (far, far), (middle, middle), (far, near), (near, far)], "black", 30
        ),
    }
    images = {caption: Image.new("RGB", (SIDE, SIDE), "white") for caption in drawn}
    for caption, draw in drawn.items():
        draw(ImageDraw.Draw(images[caption]))
    return images


def check_itself(towers: Towers) -> list[list[float]]:
    """Cosines [4, 4] of the captions (rows) and images (columns) of `pairs`, under the checkpoint's own heads."""
    resize = resize_transform(towers.preprocess)
    pixels = torch.stack([torch.from_numpy(np.array(resize(image))).permute(2, 0, 1) for image in pairs().values()])
    embedded = embed(towers.heads, towers.image_features(pixels), towers.text_features(list(pairs())))
    return (embedded.u @ embedded.v.T).tolist()


def _tells_apart(cosines: list[list[float]]) -> bool:
    """Whether each right pair scores above the wrong ones of its caption and of its image. NaN is above nothing."""
    return all(cosines[i][i] > wrong for i in range(len(cosines)) for wrong in _wrong(cosines, i))


def _wrong(cosines: list[list[float]], i: int) -> list[float]:
    """Cosines of the wrong pairs of caption i and of image i."""
    return [value for j in range(len(cosines)) if j != i for value in (cosines[i][j], cosines[j][i])]


def _size(size: Any) -> str:
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return f"{width} x {height} pixels"


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _tokenizer(towers: Towers) -> str:
    own = getattr(towers.tokenizer, "tokenizer", None)  # of transformers, inside open_clip's
    kind = type(towers.tokenizer).__name__
    return kind if own is None else f"{kind} of {type(own).__name__}, {len(own)} tokens"


def _head(weight: Any, biased: bool) -> str:
    rows, columns = weight.shape
    return f"{rows - biased} x {columns}" + (" and a bias" if biased else "")
