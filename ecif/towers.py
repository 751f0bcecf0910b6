"""An open_clip model split into frozen trunks and the two linear heads.

Trunk: everything up to the last features. Head: the final bias-free linear projection to the shared space. A tower that ends in
anything else gets an identity head on its whole output, which is the same model.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from ecif.heads import Heads, standardised

PROBE = "A photo of 2 cats (déjà vu!), 漢字 and \U0001f642 " + "word " * 100  # its tokens tell tokenizers apart


class Towers(nn.Module):
    """Frozen trunks with their preprocessing; `heads` holds the projections that were cut off."""

    def __init__(self, model: nn.Module, architecture: dict[str, Any], tokenizer: Any, preprocess: dict[str, Any]):
        super().__init__()
        self.fingerprint = _fingerprint(model, architecture, tokenizer, preprocess)
        logit_scale = float(model.logit_scale.detach().exp().reshape(-1)[0])  # type: ignore[operator, union-attr]
        embed_dim = _embed_dim(model)
        image, text = _cut_image_head(model.visual), _cut_text_head(model)
        identity = torch.eye(embed_dim)
        self.heads = standardised(
            Heads(identity if image is None else image, identity.clone() if text is None else text, logit_scale)
        )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocess = preprocess

    @torch.inference_mode()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit-norm trunk features [B, d_x] of uint8 pixels [B, 3, H, W] that `resize_transform` prepared.

        Bias-free cosine heads do not see the norm of a feature, so it is dropped here and fits half precision.
        """
        mean, std = (torch.tensor(self.preprocess[k], device=pixels.device).view(1, 3, 1, 1) for k in ("mean", "std"))
        return nn.functional.normalize(self.model.encode_image((pixels.float() / 255 - mean) / std).float(), dim=1)  # type: ignore[operator]

    @torch.inference_mode()
    def text_features(self, captions: list[str]) -> Tensor:
        """Unit-norm trunk features [B, d_t] of captions, cut to the model's context length."""
        tokens = self.tokenizer(captions).to(next(self.model.parameters()).device)
        return nn.functional.normalize(self.model.encode_text(tokens).float(), dim=1)  # type: ignore[operator]


def load(name: str, checkpoint: str | None = None) -> Towers:
    """Load an open_clip model from local files only.

    Args:
        name: an open_clip architecture, or `local-dir:PATH` of a folder with `open_clip_config.json` and weights.
        checkpoint: path of a `.pt` (weights only) or `.safetensors` state dict; not with `local-dir:`.

    Raises:
        ValueError: an architecture without a checkpoint: random weights would score nothing.
        Exception: what open_clip raises for an unknown name or a checkpoint that does not fit.
    """
    if not name.startswith("local-dir:") and checkpoint is None:
        raise ValueError(f"model {name!r} needs a checkpoint: give model.checkpoint, or a local-dir: model folder")
    if name.startswith("hf-hub:"):
        raise ValueError(f"model {name!r}: download it first and name the folder with local-dir:PATH")
    model = open_clip.create_model(name, pretrained=checkpoint, weights_only=True, require_pretrained=True)
    return Towers(model, _architecture(name), open_clip.get_tokenizer(name), open_clip.get_model_preprocess_cfg(model))


def resize_transform(preprocess: dict[str, Any]) -> Any:
    """The model's own preprocessing from a PIL image up to, not including, the tensor: resized, cropped, RGB."""
    transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    transform.transforms = transform.transforms[:-2]  # without ToTensor and Normalize, which `image_features` does
    return transform


def _embed_dim(model: Any) -> int:
    """Width of the shared space: no attribute says it for every tower, an embedding does."""
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    with torch.inference_mode():
        return int(model.eval().encode_image(torch.zeros(1, 3, height, width)).shape[1])


def _cut_image_head(visual: Any) -> Tensor | None:
    """Take the final projection [d_x, d] off the image tower; None where it does not end in one."""
    if isinstance(getattr(visual, "proj", None), nn.Parameter):  # open_clip's VisionTransformer
        weight = visual.proj.detach().float().clone()
        visual.proj = None
        return weight
    return _cut_linear(getattr(visual, "head", None), "proj")  # timm towers


def _cut_text_head(model: Any) -> Tensor | None:
    """Take the final projection [d_t, d] off the text tower; None where it does not end in one."""
    text = getattr(model, "text", model)
    projection = getattr(text, "text_projection", None)
    if isinstance(projection, nn.Parameter):
        text.text_projection = None
        return projection.detach().float().clone()
    if isinstance(projection, nn.Linear) and projection.bias is None:
        text.text_projection = None
        return projection.weight.detach().float().T.clone()
    return _cut_linear(text, "proj")  # Hugging Face towers


def _cut_linear(owner: Any, name: str) -> Tensor | None:
    """Replace the bias-free nn.Linear `owner.name` by the identity and return its weight transposed."""
    linear = getattr(owner, name, None)
    if not isinstance(linear, nn.Linear) or linear.bias is not None:
        return None
    setattr(owner, name, nn.Identity())
    return linear.weight.detach().float().T.clone()


def _architecture(name: str) -> dict[str, Any]:
    """The model's configuration, without the places where its parts were found."""
    if name.startswith("local-dir:"):
        config = json.loads((Path(name.removeprefix("local-dir:")) / "open_clip_config.json").read_text())["model_cfg"]
    else:
        config = open_clip.get_model_config(name)
    text = {k: v for k, v in config["text_cfg"].items() if k not in ("hf_model_name", "hf_tokenizer_name")}
    return config | {"text_cfg": text}


def _fingerprint(model: nn.Module, architecture: dict[str, Any], tokenizer: Any, preprocess: dict[str, Any]) -> str:
    """Hash of every weight and of all that decides what they do: the same model has the same one wherever it is stored.

    The weights alone do not say which activation, pooling or tokenizer they are for.
    """
    tokens = tokenizer([PROBE]).tolist()
    config = getattr(getattr(model, "text", None), "config", None)
    hf: dict[str, Any] = config.to_dict() if config is not None else {}
    hf = {key: value for key, value in hf.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps([architecture, tokens, hf, preprocess], sort_keys=True, default=str).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
