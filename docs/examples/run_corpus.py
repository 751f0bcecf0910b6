"""Score a corpus from Python: a configuration, a run, its columns, and a subset to train on.

    python docs/examples/run_corpus.py                  # the embedded emoji, with a tiny model of random weights: half a minute
    python docs/examples/run_corpus.py config.yaml      # yours

The run folder keeps everything. The same call on the same folder computes nothing again, and `open_run` reads it later.
"""

import json
import logging
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from open_clip.model import CLIP
from safetensors.torch import save_file

from pipeline import Config, open_run, run
from pipeline.results.select import chosen_filter, select
from pipeline.results.write import write_subset

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 1},
}


def main(path: Path) -> int:
    """Run a configuration; print what was found and return the number of pairs to keep."""
    config = Config.from_yaml(path)
    done = run(config)
    print(f"{done.scored} of {done.pairs} pairs scored, {sum(done.quarantined.values())} quarantined")

    finished = open_run(config.run)  # from now on the folder is enough
    scores = finished.scores(["uid", "key", "misalignment"])  # a pyarrow table; every column by default
    for pair in scores.sort_by([("misalignment", "descending")]).slice(0, 5).to_pylist():
        print(f"misaligned with probability {pair['misalignment']:.2f}: {pair['key']}")

    column, share = chosen_filter(finished, None, None)
    selected = select(finished.of_shards, column, share)
    count = write_subset(f"{config.run}/subset.npy", finished.of_shards, selected)
    print(f"{count} pairs kept by {column}: {config.run}/subset.npy")
    return count


def embedded_emoji(folder: Path) -> Path:
    """Write a configuration for one shard of the emoji that ecif brings along; returns its path."""
    corpus = Path(str(files("jobs.demo") / "corpus"))
    config = {
        "run": str(folder / "run"),
        "corpus": {"shards": str(corpus / "corpus" / "00000.tar")},
        "model": {"name": f"local-dir:{tiny_model(folder / 'model')}"},
        "targets": {"clean": {"shards": str(corpus / "target")}},
        # These make it fast, not good. Leave them out for a corpus of yours.
        "batch_size": 64,
        "fit": {"folds": 2, "epochs": 2, "checkpoints": 1},
        "solve": {"iterations": 6, "refits": 4, "dampings": [0.01, 0.1]},
        "score": {"repeats": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def tiny_model(folder: Path) -> Path:
    """Write an open_clip model with random weights: it knows nothing, but it needs no download."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in CLIP(**TINY).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess}))
    return folder


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ecif").setLevel(logging.INFO)  # ecif says nothing unless it is asked to
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else embedded_emoji(Path(tempfile.mkdtemp(prefix="ecif-example-"))))
