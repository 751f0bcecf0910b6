"""`ecif model` says what was loaded, and warns where right pairs do not score above wrong ones."""

import copy

import pytest
import torch

from ecif import towers
from pipeline.operate.model import WARNING, check_itself, describe, pairs
from pipeline.sections import Model
from tests.support.small_models import TINY, write_model


def test_what_was_loaded(tmp_path):
    config = copy.deepcopy(TINY) | {"quick_gelu": True, "init_logit_bias": -10}
    facts = describe(Model(name=write_model(tmp_path / "m", config))).facts
    assert facts["images"] == "32 x 32 pixels, shortest, bicubic"
    assert facts["mean"] == facts["std"] == "0.5, 0.5, 0.5"
    assert facts["activation"] == "QuickGELU"
    assert (facts["tokenizer"], facts["context length"]) == ("SimpleTokenizer", "12")
    assert (facts["logit scale"], facts["logit bias"]) == ("14.2857", "-10")
    assert (facts["image head"], facts["text head"]) == ("64 x 16", "48 x 16")
    assert facts["fingerprint"] == towers.load(f"local-dir:{tmp_path / 'm'}").fingerprint


def test_untrained_weights_are_told_by_the_drawn_images(tiny_model):
    assert describe(Model(name=tiny_model)).warning == WARNING


def test_a_model_that_tells_them_apart_gets_no_warning(tiny_model, monkeypatch):
    model = towers.load(tiny_model)
    resized, count = towers.resize_transform(model.preprocess), len(pairs())
    images = model.image_features(torch.stack([_pixels(resized(image)) for image in pairs().values()]))
    texts = model.text_features(list(pairs()))
    # The heads that send image i and caption i to the same corner of the shared space: W = X^+ I.
    corners = torch.eye(count, 16)
    model.heads = model.heads._replace(image=torch.linalg.pinv(images) @ corners, text=torch.linalg.pinv(texts) @ corners)
    assert torch.allclose(torch.tensor(check_itself(model)), torch.eye(count), atol=1e-3)
    monkeypatch.setattr("pipeline.operate.model.load_model", lambda _: model)
    assert describe(Model(name=tiny_model)).warning == ""
    model.heads = model.heads._replace(text=model.heads.text * float("nan"))
    assert describe(Model(name=tiny_model)).warning == WARNING


def _pixels(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size, 3).permute(2, 0, 1)


@pytest.mark.parametrize("url", ["s3://bucket/w.pt", "https://u:secret@host/w.pt?X-Amz-Signature=secret"])
def test_credentials_in_a_url_are_in_no_text_of_a_configuration(url):
    model = Model(name="ViT-B-32", checkpoint=url)
    assert model.checkpoint == url
    for text in (repr(model), str(model), model.model_dump_json(), str(model.model_dump())):
        assert "secret" not in text
    assert Model(name="ViT-B-32", checkpoints=[url]).each()[0].checkpoint == url
