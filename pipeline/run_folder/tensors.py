"""Heads and directions on storage: one safetensors object each, with deterministic bytes."""

import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ecif.heads import Heads
from pipeline import storage


def write(url: str, tensors: dict[str, Tensor], **facts: Any) -> None:
    """Write tensors and JSON facts. One metadata entry: safetensors does not keep the order of several."""
    contiguous = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
    storage.write_bytes(url, save(contiguous, metadata={"facts": json.dumps(facts, sort_keys=True)}))


def read(url: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts; FileNotFoundError if they have not been written."""
    data = storage.read_bytes(url)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), json.loads(header["__metadata__"]["facts"])


def pack(heads: list[Heads]) -> dict[str, Tensor]:
    """Several heads of one shape as tensors."""
    return {
        "image": torch.stack([h.image.cpu() for h in heads]),
        "text": torch.stack([h.text.cpu() for h in heads]),
        "logit_scale": torch.tensor([h.logit_scale for h in heads], dtype=torch.float64),
        "logit_bias": torch.tensor([h.logit_bias for h in heads], dtype=torch.float64),
        "trained": torch.tensor([[h.train_logit_scale, h.train_logit_bias] for h in heads]),
    }


def unpack(tensors: dict[str, Tensor]) -> list[Heads]:
    """The inverse of `pack`."""
    scalars = [tensors[name].tolist() for name in ("logit_scale", "logit_bias", "trained")]
    parts = zip(tensors["image"], tensors["text"], *scalars, strict=True)
    return [Heads(image, text, scale, bias, *trained) for image, text, scale, bias, trained in parts]
