import copy
import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file

from ecif import towers
from ecif.heads import embed, logits
from tests.support.small_models import PREPROCESS, TINY, write_model

CAPTIONS = ["a red square", "nothing of the kind", "two cats"]
TIMM = {"timm_model_name": "tf_efficientnet_lite0", "timm_model_pretrained": False, "timm_pool": "", "image_size": 32}
VARIANTS = {
    "ViT and transformer": TINY,
    "custom text tower": TINY | {"custom_text": True},
    "timm tower with a projection": TINY | {"vision_cfg": TIMM | {"timm_proj": "linear"}, "custom_text": True},
    "timm tower with an MLP": TINY | {"vision_cfg": TIMM | {"timm_proj": "mlp"}, "custom_text": True},
    "timm tower with a biased projection": TINY
    | {"vision_cfg": TIMM | {"timm_proj": "linear", "timm_proj_bias": True}, "custom_text": True},
    "text projection with a bias": TINY | {"text_cfg": TINY["text_cfg"] | {"proj_bias": True}, "custom_text": True},
    "SigLIP's logit bias": TINY | {"init_logit_bias": -10, "custom_text": True},
    "no text projection": TINY | {"text_cfg": TINY["text_cfg"] | {"width": 16, "proj_type": "none"}, "custom_text": True},
}


@pytest.fixture
def images():
    g = np.random.default_rng(0)
    return [Image.fromarray(g.integers(0, 255, (40 + 9 * i, 50, 3), dtype=np.uint8)) for i in range(3)]


def split_logits(model, images):
    resize = towers.resize_transform(model.preprocess)
    pixels = torch.stack([torch.from_numpy(np.array(resize(i))).permute(2, 0, 1) for i in images])
    return logits(model.heads, embed(model.heads, model.image_features(pixels), model.text_features(CAPTIONS)))


def write_random(folder, variant):
    """A model folder in which no bias is the 0 that it is initialised with."""
    name = write_model(folder, copy.deepcopy(VARIANTS[variant]))
    weights = load_file(folder / "open_clip_model.safetensors")
    for key in weights:
        if key in ("text.text_projection.bias", "visual.head.proj.bias"):
            weights[key] = 0.1 * torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(1))
        if key == "logit_bias":
            weights[key] = torch.tensor(-3.0)
    save_file(weights, folder / "open_clip_model.safetensors")
    return name


@pytest.mark.parametrize("variant", VARIANTS)
def test_trunk_and_head_are_together_the_whole_model(tmp_path, images, variant):
    name = write_random(tmp_path, variant)
    whole, preprocess = open_clip.create_model_from_pretrained(name)
    whole.eval()
    with torch.no_grad():
        v = whole.encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
        u = whole.encode_text(open_clip.get_tokenizer(name)(CAPTIONS), normalize=True)
        truth = whole.logit_scale.exp() * u @ v.T + (0 if whole.logit_bias is None else whole.logit_bias)
    assert torch.allclose(split_logits(towers.load(name), images), truth, atol=1e-5)


def test_a_final_projection_becomes_the_head_and_anything_else_an_identity(tmp_path):
    cut = towers.load(write_model(tmp_path / "a", copy.deepcopy(TINY))).heads
    assert (tuple(cut.image.shape), tuple(cut.text.shape)) == ((64, 16), (48, 16))
    biased = towers.load(write_random(tmp_path / "b", "text projection with a bias")).heads
    assert (tuple(biased.image.shape), tuple(biased.text.shape)) == ((64, 16), (48 + 1, 16))
    assert biased.text[-1].abs().min() > 0
    mlp = towers.load(write_model(tmp_path / "c", copy.deepcopy(VARIANTS["timm tower with an MLP"]))).heads
    assert torch.allclose(mlp.image, torch.eye(16))


def test_an_architecture_with_a_local_checkpoint(tmp_path, tiny_model):
    folder = tiny_model.removeprefix("local-dir:")
    open_clip.add_model_config(_config_file(tmp_path))
    safetensors = towers.load("tiny", f"{folder}/open_clip_model.safetensors")
    torch.save(open_clip.create_model(tiny_model).state_dict(), tmp_path / "weights.pt")
    pt = towers.load("tiny", str(tmp_path / "weights.pt"))
    assert torch.equal(safetensors.heads.image, pt.heads.image)
    assert torch.equal(safetensors.heads.image, towers.load(tiny_model).heads.image)
    assert len({safetensors.fingerprint, pt.fingerprint}) == 1


def test_a_checkpoint_takes_the_place_of_a_folders_weights(tmp_path, tiny_model):
    other = write_random(tmp_path / "other", "ViT and transformer")
    weights = load_file(tmp_path / "other" / "open_clip_model.safetensors")
    weights["visual.proj"] = 2 * weights["visual.proj"] + 1
    save_file(weights, tmp_path / "weights.safetensors")
    changed = towers.load(tiny_model, str(tmp_path / "weights.safetensors"))
    assert changed.fingerprint != towers.load(other).fingerprint == towers.load(tiny_model).fingerprint
    assert not torch.allclose(changed.heads.image, towers.load(tiny_model).heads.image)


def _config_file(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return tmp_path / "tiny.json"


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    open_clip.add_model_config(_config_file(tmp_path))
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(Exception, match="without running code"):
        towers.load("tiny", str(tmp_path / "bomb.pt"))
    assert not (tmp_path / "executed").exists()


def test_random_weights_are_refused():
    with pytest.raises(ValueError, match="checkpoint"):
        towers.load("ViT-B-32")


def test_fingerprint_follows_the_weights_not_the_place(tmp_path, tiny_model):
    copied = write_model(tmp_path / "elsewhere", copy.deepcopy(TINY))
    assert towers.load(copied).fingerprint == towers.load(tiny_model).fingerprint
    other = copy.deepcopy(TINY)
    other["vision_cfg"]["patch_size"] = 8
    assert towers.load(write_model(tmp_path / "other", other)).fingerprint != towers.load(tiny_model).fingerprint


def test_the_same_weights_for_another_activation_are_another_model(tmp_path, tiny_model):
    quick = write_model(tmp_path / "quick", copy.deepcopy(TINY) | {"quick_gelu": True})
    assert towers.load(quick).fingerprint != towers.load(tiny_model).fingerprint


def test_preprocessing_is_open_clips_own(images):
    full = image_transform_v2(PreprocessCfg(size=(32, 32), **PREPROCESS), is_train=False)
    ours = towers.resize_transform({"size": (32, 32), "mode": "RGB", "resize_mode": "shortest", "fill_color": 0, **PREPROCESS})
    for image in images:
        pixels = torch.from_numpy(np.array(ours(image))).permute(2, 0, 1).float()
        assert torch.allclose((pixels / 255 - 0.5) / 0.5, full(image), atol=1e-6)
