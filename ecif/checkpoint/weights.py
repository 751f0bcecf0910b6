"""Weights of a file into a model: every tensor has to be there, of its shape and finite, or one line says what is wrong."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ecif.checkpoint import wrappers
from ecif.checkpoint.architectures import architectures_of
from ecif.checkpoint.error import ModelError
from ecif.checkpoint.formats import Content
from ecif.checkpoint.wrappers import Found

SHOWN = 3  # names of each kind in an error
NO_PARAMETERS = {"n_averaged", "text.transformer.embeddings.position_ids"}  # a count of torch's AveragedModel; old transformers
TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")  # CLIP's text tower

# Names by which other libraries' weights are known, and what to do.
FOREIGN = {
    "vision_model.": "Hugging Face transformers: take open_clip's file of the same model, or convert it",
    "text_model.": "Hugging Face transformers: take open_clip's file of the same model, or convert it",
    "base_model.": "an adapter (PEFT): merge it into the model first",
    "lora_": "an adapter (LoRA): merge it into the model first",
    "text_decoder.": "CoCa: name a coca_ architecture",
    "visual.trunk.": "an image tower of timm",
    "trunk.": "an image tower alone",
    "blocks.": "an image tower alone",
    "encoder.layer.": "a text encoder alone",
}


def load_into(model: Any, content: Content, name: str) -> list[str]:
    """Load the weights of a file into a model of open_clip. A file with a logit bias gives the model one.

    Args:
        model: of the architecture that the weights are for.
        content: of the file.
        name: of the architecture, for errors.

    Returns:
        Lines about what was taken where that is not obvious.

    Raises:
        ModelError: the file has not the model's weights, or some are not finite.
    """
    if content.tree is None:
        return _load_big_vision(model, content, name)
    found = _find(model, content, name)
    tensors = _converted(model, found.tensors)
    if not content.all_are_weights:  # an archive also has tensors that are no weights
        tensors = {key: tensor for key, tensor in tensors.items() if key in model.state_dict() or key == "logit_bias"}
    if "logit_bias" in tensors and model.logit_bias is None:
        model.logit_bias = nn.Parameter(torch.zeros([]))
    elif "logit_bias" not in tensors and model.logit_bias is not None:
        tensors["logit_bias"] = torch.zeros([])  # as open_clip does: weights of a softmax loss have none
    wanted = model.state_dict()
    tensors = {key: _same_rank(tensor, wanted.get(key)) for key, tensor in tensors.items()}
    tensors, resized = _resized(model, tensors, wanted)
    _check_names(content, found, name, wanted, tensors)
    _check_values(content, tensors)
    model.load_state_dict(tensors, strict=True)
    return [*_notes(content, found), *resized]


def _find(model: Any, content: Content, name: str) -> Found:
    names = {other for key in model.state_dict() for other in (key, key.removeprefix("text."), f"text.{key}")}
    try:
        found = wrappers.find(content.tree, {*names, "logit_scale", "logit_bias"})
    except ValueError as several:
        raise ModelError(f"{content.path} holds several models, under {several}: save the weights of one alone") from None
    if found is None or _is_apple(found.tensors):
        tensors = dict(content.tree) if isinstance(content.tree, dict) else {}
        for key in ("state_dict", "model"):
            tensors = tensors[key] if isinstance(tensors.get(key), dict) else tensors
        tensors = {key: value for key, value in tensors.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if not tensors:
            raise ModelError(f"{content.path} ({content.kind}) holds no tensors with names of {name}: save model.state_dict()")
        return Found("", tensors, [], [])
    return found


def _is_apple(tensors: dict[str, Tensor]) -> bool:
    return any(key.startswith("image_encoder.model.patch_emb") for key in tensors)


def _converted(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under open_clip's names for this model: Apple's MobileCLIP, and text towers of an older or newer form."""
    from open_clip.convert import convert_state_dict

    if _is_apple(tensors):
        try:
            tensors = convert_state_dict(model, tensors)
        except Exception:  # noqa: BLE001  (a model of another form)
            return tensors
    own_tower = hasattr(model, "text")
    if own_tower and "positional_embedding" in tensors:
        tensors = {f"text.{key}" if key.startswith(TEXT) else key: tensor for key, tensor in tensors.items()}
    elif not own_tower and "text.positional_embedding" in tensors:
        tensors = {key.removeprefix("text."): tensor for key, tensor in tensors.items()}
    gone = NO_PARAMETERS - model.state_dict().keys()
    return {key: tensor for key, tensor in tensors.items() if key not in gone}


def _same_rank(tensor: Tensor, wanted: Tensor | None) -> Tensor:
    """A scalar as the model has it: with no dimension, or with one of length 1."""
    if wanted is not None and tensor.shape != wanted.shape and tensor.numel() == wanted.numel() == 1:
        return tensor.reshape(wanted.shape)
    return tensor


def _resized(model: Any, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Positions of another image size or context length, interpolated as open_clip does, if all else is of the right shape."""
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    other = [key for key, tensor in tensors.items() if key in wanted and tensor.shape != wanted[key].shape]
    positions = {"visual.positional_embedding", "positional_embedding", "text.positional_embedding"}
    if not other or not set(other) <= positions or any(tensors[key].shape[1:] != wanted[key].shape[1:] for key in other):
        return tensors, []
    resized = dict(tensors)
    try:
        resize_pos_embed(resized, model)
        resize_text_pos_embed(resized, model)
    except Exception:  # noqa: BLE001  (positions that are no square: another architecture)
        return tensors, []
    said = [f"{key} has {len(tensors[key])} positions, the model {len(wanted[key])}: interpolated" for key in other]
    return resized, said


def _check_names(content: Content, found: Found, name: str, wanted: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    missing = [key for key in wanted if key not in tensors]
    unexpected = [key for key in tensors if key not in wanted]
    shapes = [
        f"{key} {list(tensors[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted
        if key in tensors and tensors[key].shape != wanted[key].shape
    ]
    kinds = [
        f"{key} ({tensors[key].dtype}, {tensors[key].layout})".replace("torch.", "")
        for key in wanted
        if key in tensors and _is_coded(tensors[key], wanted[key])
    ]
    faults = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "not plain floating-point numbers": kinds,
    }
    if not any(faults.values()):
        return
    said = "; ".join(f"{len(keys)} {what}: {_first(keys)}" for what, keys in faults.items() if keys)
    where = f", under `{found.place}`" if found.place else ""
    foreign = next(
        (f" (these are names of {what})" for start, what in FOREIGN.items() if any(k.startswith(start) for k in unexpected)), ""
    )
    advice = _advice(tensors) if unexpected or shapes or kinds else "save the state_dict of the whole model"
    raise ModelError(f"{content.path} ({content.kind}{where}) does not fit {name}: {said}{foreign}; {advice}")


def _advice(tensors: dict[str, Tensor]) -> str:
    near = architectures_of(tensors)
    return (
        f"these look like weights of {' or '.join(near)}" if near else "name the architecture that the weights were trained as"
    )


def _is_coded(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether weights are no plain numbers: quantised to integers, which would load as large numbers, sparse, or left out."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return not plain or (wanted.is_floating_point() and not tensor.is_floating_point())


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def _check_values(content: Content, tensors: dict[str, Tensor]) -> None:
    """Refuse weights that would give NaN: not finite also when they become float32, or matrices of zeros only."""
    bad = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not _finite(tensor.float())]
    if bad:
        what = f"{len(bad)} of {len(tensors)} tensors with NaN or infinity: {_first(bad)}"
        raise ModelError(f"{content.path} holds {what}; the training diverged, or the file is damaged: take an earlier one")
    matrices = {key: tensor for key, tensor in tensors.items() if tensor.dim() > 1 and min(tensor.shape[:2]) > 1}
    zeros = [key for key, matrix in matrices.items() if not matrix[0].any() and not matrix.any()]
    if zeros:
        what = f"{len(zeros)} of {len(tensors)} tensors with zeros only: {_first(zeros)}"
        raise ModelError(f"{content.path} holds {what}; the file was not fetched to its end, or not trained: fetch it again")
    log_scale = float(tensors["logit_scale"].detach().float().reshape(-1)[0])
    scale = float(torch.tensor(log_scale).exp())
    if not math.isfinite(scale) or scale == 0:
        why = "it holds the logarithm of the scale, 4.6 for 100"
        raise ModelError(f"{content.path}: logit_scale {log_scale:g} makes the logits' scale {scale:g}; {why}")


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. A sum tells in a fraction of the time, unless it overflows."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _notes(content: Content, found: Found) -> list[str]:
    notes = []
    if any(wrappers.MEANS.search(word) for word in found.place.split(".")):
        notes.append(f"{content.path}: the weights are the running mean (EMA) under `{found.place}`")
    if found.beside:
        beside = ", ".join(f"`{place}`" for place in found.beside)
        notes.append(f"{content.path}: the weights under `{found.place}` are taken, and not those under {beside}")
    if left := [key for key in found.left if key not in NO_PARAMETERS]:
        notes.append(f"{content.path}: {len(left)} tensors beside the weights are left out: {_first(left)}")
    return notes


def _load_big_vision(model: Any, content: Content, name: str) -> list[str]:
    """Google's own SigLIP files."""
    from open_clip.convert import load_big_vision_weights

    try:
        load_big_vision_weights(model, content.path)
    except Exception:  # noqa: BLE001  (another architecture fails anywhere in it)
        raise ModelError(
            f"{content.path} ({content.kind}) does not fit {name}: such files are for architectures of SigLIP"
        ) from None
    _check_values(content, model.state_dict())
    return []
