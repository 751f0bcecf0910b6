"""The model in an actor: pixels and tokens of a part in, features out. Several threads may call it."""

import threading
import time
import warnings
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.towers.precision import Precision, computed_in, prepare
from pipeline.sections import Model
from pipeline.stages.embed.rows import Part
from pipeline.workers.cluster import device
from pipeline.workers.model import as_tokens, load

FORWARD_BATCH = {"cpu": 32, "cuda": 256}


class Computed(NamedTuple):
    """The features of a part."""

    images: NDArray[np.float16]  # [B, d_x]
    texts: NDArray[np.float16]  # [B, d_t]
    seconds: float  # that the model worked
    ended: float  # when it had done so, by `time.perf_counter`


class Forward:
    """Computes one part at a time. Meanwhile other threads may copy the next part to the GPU, or write the one before.

    Args:
        model: with its weights.
        precision: of the trunks; `auto` is the best of this device.
    """

    def __init__(self, model: Model, precision: Precision | Literal["auto"]):
        # Parts lie in Ray's object store, which nobody writes into: torch warns of that, and only reads.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.device = device()
        self.towers = load(model)
        self.precision = prepare(self.towers, precision, self.device)
        self._turn = threading.Lock()
        self._copies = torch.cuda.Stream() if self.device.type == "cuda" else None

    def __call__(self, part: Part) -> Computed:
        """The features of a part, which has pixels."""
        if not part.pairs:
            d_x, d_t = self.towers.heads.image.shape[0], self.towers.heads.text.shape[0]
            return Computed(np.empty((0, d_x), np.float16), np.empty((0, d_t), np.float16), 0.0, time.perf_counter())
        assert part.pixels is not None
        tokens = part.tokens
        if tokens is None:
            tokens = as_tokens(self.towers.tokenizer, [pair.caption for pair in part.pairs])
        inputs = torch.from_numpy(part.pixels), torch.from_numpy(tokens)
        return self._on_cpu(*inputs) if self._copies is None else self._on_gpu(*inputs, self._copies)

    def _on_cpu(self, pixels: Tensor, tokens: Tensor) -> Computed:
        device()  # each thread has to be told to compute alone
        with self._turn:
            started = time.perf_counter()
            images, texts = self._features(pixels, tokens)
            ended = time.perf_counter()
        return Computed(images.numpy(), texts.numpy(), ended - started, ended)

    def _on_gpu(self, pixels: Tensor, tokens: Tensor, copies: torch.cuda.Stream) -> Computed:
        """The turn is for starting kernels: those of the next part wait on the GPU when those of this one end."""
        with torch.cuda.stream(copies):
            inputs = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in (pixels, tokens)]
            copied = copies.record_event()
        began, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with self._turn:
            stream = torch.cuda.current_stream()
            stream.wait_event(copied)
            for tensor in inputs:
                tensor.record_stream(stream)  # its memory is not given away before the model has read it
            began.record()
            outputs = [_to_pinned(features) for features in self._features(*inputs)]
            done.record()
        done.synchronize()
        images, texts = (tensor.numpy() for tensor in outputs)
        return Computed(images, texts, began.elapsed_time(done) / 1000, time.perf_counter())

    def _features(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, d_x] and [B, d_t] in float16 of pixels [B, H, W, 3] and tokens [B, L]."""
        size, images, texts = FORWARD_BATCH[self.device.type], [], []
        with computed_in(self.precision, self.device):
            for i in range(0, len(pixels), size):
                batch = pixels[i : i + size].permute(0, 3, 1, 2).contiguous()
                images.append(self.towers.image_features(batch).half())
                texts.append(self.towers.token_features(tokens[i : i + size].long()).half())
        return torch.cat(images), torch.cat(texts)


def _to_pinned(tensor: Tensor) -> Tensor:
    """A copy in memory that the GPU writes by itself. It is there when the stream has come so far."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
