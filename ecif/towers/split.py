"""An open_clip model split into frozen trunks and the two linear heads.

A trunk is everything up to the last features, with a final LayerNorm. A head is the final linear projection to the shared
space. A projection with a bias becomes a head with one more row, and its features get a 1 appended. A tower that ends in
anything else gets an identity head on its whole output, which leaves the model the same. Embeddings are normalised to length 1
after the heads.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ecif.heads import Heads, standardised

PROBE = "A photo of 2 cats (déjà vu!), 漢字 and \U0001f642 " + "word " * 100  # its tokens tell tokenizers apart


class Towers(nn.Module):
    """Frozen trunks with their preprocessing. `heads` holds the projections that were cut off."""

    def __init__(
        self,
        model: nn.Module,
        architecture: dict[str, Any],
        tokenizer: Any,
        preprocess: dict[str, Any],
        notes: Sequence[str] = (),
        named: bool = True,
    ):
        super().__init__()
        self.architecture, self.notes = architecture, list(notes)
        self.sha256: str | None = None  # of the file of weights, where a caller has it
        self.fingerprint = _fingerprint(model, architecture, tokenizer, preprocess) if named else ""
        logit_scale = float(model.logit_scale.detach().exp().reshape(-1)[0])  # type: ignore[operator, union-attr]
        embed_dim = _embed_dim(model)
        image, text = _cut_image_head(model.visual), _cut_text_head(model)
        identity = torch.eye(embed_dim)
        logit_bias = getattr(model, "logit_bias", None)
        self.heads = standardised(
            Heads(
                identity if image is None else image.weight,
                identity.clone() if text is None else text.weight,
                logit_scale,
                0.0 if logit_bias is None else float(logit_bias.detach()),
            )
        )
        self.image_biased, self.text_biased = image is not None and image.biased, text is not None and text.biased
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocess = preprocess

    @torch.inference_mode()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit-norm trunk features [B, d_x] of uint8 pixels [B, 3, H, W] that `resize_transform` prepared.

        Cosine heads are invariant to the norm of a feature (with the 1 for a bias), so features are scaled to length 1. They
        then fit in half precision.
        """
        return _unit(self.model.encode_image(normalised(pixels, self.preprocess)), self.image_biased)  # type: ignore[operator]

    @torch.inference_mode()
    def text_features(self, captions: list[str]) -> Tensor:
        """Unit-norm trunk features [B, d_t] of captions, cut to the model's context length."""
        return self.token_features(self.tokenizer(captions).to(next(self.model.parameters()).device))

    @torch.inference_mode()
    def token_features(self, tokens: Tensor) -> Tensor:
        """Unit-norm trunk features [B, d_t] of tokens [B, L], int64, that the model's tokenizer made."""
        return _unit(self.model.encode_text(tokens), self.text_biased)  # type: ignore[operator]


def normalised(pixels: Tensor, preprocess: dict[str, Any]) -> Tensor:
    """Convert uint8 pixels [B, 3, H, W] that `resize_transform` prepared to the normalised float32 that the model takes."""
    mean, std = (_channels(tuple(preprocess[k]), pixels.device) for k in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[1, 3, 1, 1] on a device, copied there once: a GPU would have to be waited for in every batch."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, 3, 1, 1)


def resize_transform(preprocess: dict[str, Any]) -> Any:
    """The model's own preprocessing of a PIL image, without conversion to a tensor: resized, cropped, RGB."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    transform.transforms = transform.transforms[:-2]  # without ToTensor and Normalize, which `image_features` does
    return transform


def _embed_dim(model: Any) -> int:
    """Width d of the shared space, taken from an embedding: no attribute holds it for every kind of tower."""
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    with torch.inference_mode():
        return int(model.eval().encode_image(torch.zeros(1, 3, height, width)).shape[1])


class _Projection(NamedTuple):
    """A head that was cut off."""

    weight: Tensor  # [d_x, d]; the last row is the bias, if there is one
    biased: bool


def _unit(features: Tensor, biased: bool) -> Tensor:
    """Scale features [B, d_x] to length 1. For a head with a bias, a 1 is appended first: [x, 1] / |[x, 1]|."""
    features = features.float()
    return nn.functional.normalize(nn.functional.pad(features, (0, 1), value=1.0) if biased else features, dim=1)


def _cut_image_head(visual: Any) -> _Projection | None:
    """Take the final projection off the image tower; None if the tower does not end in one."""
    if isinstance(getattr(visual, "proj", None), nn.Parameter):  # open_clip's VisionTransformer
        weight = visual.proj.detach().float().clone()
        visual.proj = None
        return _Projection(weight, False)
    return _cut_linear(getattr(visual, "head", None), "proj", nn.Identity())  # timm towers


def _cut_text_head(model: Any) -> _Projection | None:
    """Take the final projection off the text tower; None if the tower does not end in one."""
    text = getattr(model, "text", model)
    if isinstance(getattr(text, "text_projection", None), nn.Parameter):
        weight = text.text_projection.detach().float().clone()
        text.text_projection = None
        return _Projection(weight, False)
    cut = _cut_linear(text, "text_projection", None)
    return cut or _cut_linear(text, "proj", nn.Identity())  # Hugging Face towers


def _cut_linear(owner: Any, name: str, instead: nn.Module | None) -> _Projection | None:
    """Replace the nn.Linear `owner.name`; return its transposed weight, with a bias as last row. None if it is no nn.Linear."""
    linear = getattr(owner, name, None)
    if not isinstance(linear, nn.Linear):
        return None
    setattr(owner, name, instead)
    rows = [linear.weight.T] if linear.bias is None else [linear.weight.T, linear.bias[None]]
    return _Projection(torch.cat(rows).detach().float(), linear.bias is not None)


def _fingerprint(model: nn.Module, architecture: dict[str, Any], tokenizer: Any, preprocess: dict[str, Any]) -> str:
    """Hash of a model's weights, architecture, tokenizer and preprocessing. It does not depend on where the model is stored.

    The weights alone do not determine the activation, pooling or tokenizer.
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
