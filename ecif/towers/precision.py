"""In which precision a trunk computes. Everything after the features is float32 or better."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["bf16", "fp16", "fp32"]
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = (nn.Linear, nn.MultiheadAttention, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def best_precision(device: torch.device) -> Precision:
    """bf16 on a GPU that has it, fp16 on another GPU, fp32 on a CPU."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def prepare(model: nn.Module, precision: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Move a model to a device, its weights as a precision keeps them, in place; `auto` is the best of the device.

    Returns:
        The precision, for `computed_in`.
    """
    precision = best_precision(device) if precision == "auto" else precision
    keep_weights_in(precision, model)
    model.to(device)
    return precision


def keep_weights_in(precision: Precision, model: nn.Module) -> None:
    """Store the weights of a trunk's matrix products and convolutions in a precision, in place.

    Autocast would round them in every call. All else stays in float32: norms, embeddings, statistics.
    """
    if precision == "fp32":
        return
    for module in model.modules():
        if isinstance(module, PRODUCTS):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(TYPES[precision])


@contextmanager
def computed_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let trunks compute in a precision, within the body and in this thread.

    bf16 and fp16 are torch's autocast: matrix products take and give 16 bits, and sum in float32. What autocast leaves in
    float32 may use TF32. In fp32 nothing does, convolutions included, which torch would allow.
    """
    with _float32_by("ieee" if precision == "fp32" else "tf32", device):
        if precision == "fp32":
            yield
        else:
            with torch.autocast(device.type, TYPES[precision]):
                yield


@contextmanager
def _float32_by(how: str, device: torch.device) -> Iterator[None]:
    """How a GPU multiplies float32 within the body: `ieee` or `tf32`. It is a setting of the process."""
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends  # half typed
    matmul, convolution = backends.cuda.matmul, backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision
    matmul.fp32_precision = convolution.fp32_precision = how
    try:
        yield
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before
