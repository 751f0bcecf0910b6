"""Small open_clip models on disk, with random weights."""

import json
from pathlib import Path

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}


def write_model(folder: Path, model_cfg: dict) -> str:
    """An open_clip model folder with seeded random weights; returns its name."""
    import torch
    from open_clip.model import CLIP, CustomTextCLIP
    from safetensors.torch import save_file

    torch.manual_seed(0)
    plain = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    model = (CustomTextCLIP if model_cfg.get("custom_text") else CLIP)(**plain)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS}))
    return f"local-dir:{folder}"


def tiny_clip(seed: int, **changes):
    """A small CLIP of open_clip with seeded random weights."""
    import torch
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    return CLIP(**(TINY | changes))
