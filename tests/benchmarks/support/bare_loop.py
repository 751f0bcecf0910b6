"""What an engineer would write without Ray: read a tar, decode, preprocess, forward. Warm processes, a thread each."""

import io
import multiprocessing
import os
import tarfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

BATCH = 32


class Took(NamedTuple):
    """What embedding some shards took all processes."""

    pairs: int
    wall: float  # seconds, from the first start to the last end
    cpu: float  # seconds, of all processes

    @property
    def rate(self) -> float:
        """Pairs a second."""
        return self.pairs / self.wall

    @property
    def cost(self) -> float:
        """CPU seconds a pair."""
        return self.cpu / self.pairs


class BareLoop:
    """Some processes, each with the model loaded.

    Args:
        name: an open_clip `local-dir:` model.
        processes: how many; each computes in one thread.
    """

    def __init__(self, name: str, processes: int):
        spawn = multiprocessing.get_context("spawn")
        pipes = [spawn.Pipe() for _ in range(processes)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [spawn.Process(target=_serve, args=(theirs, name), daemon=True) for _, theirs in pipes]
        for process in self._processes:
            process.start()
        for end in self._ends:
            end.recv()

    def __call__(self, shards: list[Path], decoded: bool) -> Took:
        """Embed some shards, shared out one by one.

        Args:
            shards: tars.
            decoded: whether reading and decoding is done before the clock starts.
        """
        for i, end in enumerate(self._ends):
            end.send((shards[i :: len(self._ends)], decoded))
        took = [end.recv() for end in self._ends]
        started, ended = min(t["start"] for t in took), max(t["end"] for t in took)
        return Took(sum(t["pairs"] for t in took), ended - started, sum(t["cpu"] for t in took))

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(end: Connection, name: str) -> None:
    import open_clip
    import torch

    os.nice(int(os.environ.get("RAY_worker_niceness", 15)))  # noqa: SIM112  as Ray's workers are
    torch.set_num_threads(1)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)

    def batches(shards: list[Path]) -> Any:
        for shard in shards:
            images, captions = [], []
            for image, caption in _pairs(shard):
                images.append(preprocess(image))
                captions.append(caption)
                if len(images) == BATCH:
                    yield torch.stack(images), captions
                    images, captions = [], []
            if images:
                yield torch.stack(images), captions

    end.send("ready")
    with torch.inference_mode():
        while True:
            shards, decoded = end.recv()
            todo = batches(shards)
            todo = list(todo) if decoded else todo
            pairs, start, cpu = 0, time.time(), time.process_time()
            for images, captions in todo:
                model.encode_image(images, normalize=True).half().numpy()
                model.encode_text(tokenizer(captions), normalize=True).half().numpy()
                pairs += len(captions)
            end.send({"pairs": pairs, "start": start, "end": time.time(), "cpu": time.process_time() - cpu})


def _pairs(shard: Path) -> Any:
    """Image and caption of every pair, the image opened but not decoded."""
    from PIL import Image

    image = None
    with tarfile.open(shard) as tar:
        for member in tar:
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".txt"):
                yield image, data.decode()
            elif not member.name.endswith(".json"):
                image = Image.open(io.BytesIO(data))
