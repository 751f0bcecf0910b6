"""Preprocessing and activation are those that the weights were trained with: open_clip's own features, or one line."""

import copy
import json
import re

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ecif import towers
from ecif.checkpoint import ModelError
from ecif.heads import embed
from ecif.towers.load import full_name
from tests.support.small_models import TINY, tiny_clip, write_model

CAPTIONS = ["a red square", "two cats"]
TIMM = {"timm_model_pretrained": False, "timm_proj": "linear"}
SMALL = {  # name and tag in open_clip's tables, and a small architecture of that kind
    ("ViT-B-32", "openai"): TINY,
    ("ViT-B-32", "laion2b_s34b_b79k"): TINY,
    ("ViT-H-14", "dfn5b"): TINY,
    ("ViT-B-16-SigLIP", "webli"): TINY
    | {"vision_cfg": TIMM | {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 64}}
    | {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True},
    ("MobileCLIP-S1", "datacompdr"): TINY
    | {"vision_cfg": TIMM | {"timm_model_name": "test_efficientnet", "timm_pool": "", "image_size": 64}, "custom_text": True},
    ("ViT-H-14-CLIPA", "datacomp1b"): TINY,
    ("PE-Core-B-16", "meta"): TINY,
}


@pytest.fixture
def images():
    g = np.random.default_rng(0)
    return [Image.fromarray(g.integers(0, 255, (90 + 30 * i, 150, 3), dtype=np.uint8)) for i in range(2)]


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Give a small architecture the tags of a real one."""

    def add(like: str, config: dict) -> str:
        name = f"small-{len(list(tmp_path.glob('*.json')))}"  # without siglip: open_clip downloads a tokenizer by that word
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
        open_clip.add_model_config(tmp_path / f"{name}.json")
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, open_clip.pretrained._PRETRAINED[like])
        return name

    return add


def write_random(name: str, file) -> str:
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    return str(file)


def ours(model, images):
    resize = towers.resize_transform(model.preprocess)
    pixels = torch.stack([torch.from_numpy(np.array(resize(image))).permute(2, 0, 1) for image in images])
    pairs = embed(model.heads, model.image_features(pixels), model.text_features(CAPTIONS))
    return pairs.v, pairs.u


def open_clips(name, tag, file, images, monkeypatch):
    """open_clip's own pipeline of a tag, whose weights are those of a local file. It leaves the activation to its caller."""
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: file)
    quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    model, prepare = open_clip.create_model_from_pretrained(name, pretrained=tag, force_quick_gelu=quick)
    model.eval()
    with torch.no_grad():
        v = model.encode_image(torch.stack([prepare(image) for image in images]), normalize=True)
        return v, model.encode_text(open_clip.get_tokenizer(name)(CAPTIONS), normalize=True)


def close(a, b) -> bool:
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("like", "tag"), SMALL)
def test_features_are_those_of_open_clips_own_pipeline_of_the_tag(like, tag, register, images, tmp_path, monkeypatch):
    name = register(like, copy.deepcopy(SMALL[like, tag]))
    file = write_random(name, tmp_path / "weights.safetensors")
    mine = towers.load(name, file, tag)
    assert close(ours(mine, images), open_clips(name, tag, file, images, monkeypatch))
    if tag != "laion2b_s34b_b79k":
        plain = towers.load(name, file, "default")
        assert plain.fingerprint != mine.fingerprint
        assert not close(ours(plain, images), ours(mine, images))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tag"), [("ViT-B-32", "openai"), ("MobileCLIP-S1", "datacompdr"), ("ViT-B-16-SigLIP", "webli")]
)
def test_features_of_the_real_architectures(name, tag, images, tmp_path, monkeypatch):
    class Letters:  # SigLIP's own tokenizer has to be downloaded
        def __call__(self, captions):
            return torch.tensor([[ord(letter) for letter in caption.ljust(64)[:64]] for caption in captions])

    if "SigLIP" in name:
        monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: Letters())
    file = write_random(name, tmp_path / "weights.safetensors")
    assert close(ours(towers.load(name, file, tag), images), open_clips(name, tag, file, images, monkeypatch))


def test_openais_weights_are_the_same_model_under_both_names(tmp_path):
    file = write_random("ViT-B-32", tmp_path / "weights.safetensors")
    tag = towers.load("ViT-B/32", file, "openai")
    assert tag.fingerprint == towers.load("ViT-B-32-quickgelu", file).fingerprint
    assert tag.fingerprint != towers.load("ViT-B-32", file, "laion2b_s34b_b79k").fingerprint


@pytest.mark.parametrize(
    ("like", "says"),
    [
        ("ViT-B-16-SigLIP", r"default \(mean 0\.48.*resize_mode shortest\); webli \(mean 0\.5.*resize_mode squash\)"),
        ("ViT-B-32", r"default, laion2b_e16, .* and \d+ more \(activation GELU\); openai, .* \(activation QuickGELU\)"),
        ("ViT-L-14", r"laion2b_s32b_b82k \(mean 0\.5"),
        ("RN50", r"default \(activation GELU\); openai, yfcc15m, cc12m \(activation QuickGELU\)"),
    ],
)
def test_where_nothing_says_how_weights_were_trained_one_line_lists_the_choices(like, says, register, tmp_path):
    name = register(like, copy.deepcopy(TINY))
    file = write_random(name, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=says) as refused:
        towers.load(name, file)
    assert str(refused.value).isprintable() and "Say model.pretrained_cfg: TAG" in str(refused.value)


@pytest.mark.parametrize("like", ["ViT-B-32-quickgelu", "convnext_base", "EVA02-B-16", "ViT-S-32"])
def test_where_all_tags_say_the_same_nothing_has_to_be_said(like, register, tmp_path, monkeypatch):
    config = copy.deepcopy(TINY) | {"quick_gelu": "quickgelu" in like}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, like, open_clip.pretrained._PRETRAINED.get(like, {}))
    name = register(like, config)
    towers.load(name, write_random(name, tmp_path / "weights.safetensors"))


def test_a_checkpoint_of_a_training_has_the_activation_of_its_name_and_that_is_said(register, tmp_path):
    name = register("ViT-B-32", copy.deepcopy(TINY))
    weights = open_clip.create_model(name, load_weights=False).state_dict()
    torch.save({"epoch": 3, "state_dict": weights, "optimizer": {}}, tmp_path / "epoch_3.pt")
    loaded = towers.load(name, str(tmp_path / "epoch_3.pt"))
    assert re.search(r"own training, taken to have the GELU of its name", loaded.notes[0])
    name = register("ViT-L-14", copy.deepcopy(TINY))  # whose tags prepare images in two ways
    with pytest.raises(ModelError, match="several ways"):
        towers.load(name, str(tmp_path / "epoch_3.pt"))


def test_openais_own_archive_says_that_it_has_quickgelu(register, tmp_path):
    model = tiny_clip(seed=0).eval()
    for key in ("input_resolution", "context_length", "vocab_size"):
        vars(model).pop(key, None)
        model.register_buffer(key, torch.tensor(32))
    torch.jit.save(torch.jit.script(model), tmp_path / "ViT-B-32.pt")
    loaded = towers.load(register("ViT-B-32", copy.deepcopy(TINY)), str(tmp_path / "ViT-B-32.pt"))
    assert loaded.architecture["quick_gelu"]


def test_parts_of_a_preprocessing(register, tmp_path, tiny_model):
    name = register("ViT-B-16-SigLIP", copy.deepcopy(TINY))
    file = write_random(name, tmp_path / "weights.safetensors")
    whole = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    assert towers.load(name, file, preprocess=whole).fingerprint == towers.load(name, file, "webli").fingerprint
    with pytest.raises(ModelError, match="several ways"):
        towers.load(name, file, preprocess={"mean": (0.5,) * 3})
    cropped = towers.load(name, file, "webli", {"resize_mode": "shortest"}).preprocess
    assert (cropped["resize_mode"], cropped["mean"]) == ("shortest", (0.5,) * 3)
    with pytest.raises(ModelError, match=r"preprocess.size 64 is not the model's"):
        towers.load(name, file, "webli", {"size": 64})
    assert towers.load(tiny_model, preprocess={"resize_mode": "squash"}).preprocess["resize_mode"] == "squash"


def test_a_folder_without_a_preprocessing_has_open_clips_default_and_says_so(tmp_path):
    name = write_model(tmp_path / "m", copy.deepcopy(TINY))
    (tmp_path / "m" / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    loaded = towers.load(name)
    assert loaded.preprocess["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert "open_clip_config.json has no preprocess_cfg" in loaded.notes[0]
    assert towers.load(name, preprocess={"mean": (0.5,) * 3}).notes == []
    with pytest.raises(ModelError, match="no such key 'men': there are mean, std"):
        towers.load(name, preprocess={"men": (0.5,) * 3})


def test_tags_that_are_not_there(register, tmp_path, tiny_model):
    name = register("ViT-B-32", copy.deepcopy(TINY))
    file = write_random(name, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="has no tag 'open_ai': did you mean openai"):
        towers.load(name, file, "open_ai")
    assert towers.load(name, file, "LAION2B-s34b_b79k").fingerprint == towers.load(name, file, "default").fingerprint
    with pytest.raises(ModelError, match="says itself how it was trained"):
        towers.load(tiny_model, pretrained_cfg="openai")


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("ViT-B/32", "ViT-B-32"),
        ("ViT-L/14@336px", "ViT-L-14-336"),
        ("RN50x64", "RN50x64"),
    ],
)
def test_openais_spelling_of_names(name, full):
    assert full_name(name) == full


@pytest.mark.parametrize(
    ("name", "near"), [("ViT-B32", "ViT-B-32"), ("vit_l_14", "ViT-L-14"), ("ViT-B-16-siglip2", "ViT-B-16-SigLIP2")]
)
def test_a_typo_in_a_name_suggests_the_nearest(name, near, tmp_path):
    with pytest.raises(ModelError, match=f"no architecture '{name}': did you mean .*{near}"):
        towers.load(name, str(tmp_path / "weights.pt"))
