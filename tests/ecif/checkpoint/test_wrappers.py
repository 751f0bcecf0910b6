"""Every form in which trainers leave a checkpoint: written here, loaded, and equal to the weights that were saved."""

import argparse
import collections
import datetime
import json
import pathlib
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ecif.checkpoint import ModelError, load_into, read
from tests.support.small_models import TINY, tiny_clip


@pytest.fixture(scope="module")
def weights():
    return {key: value.clone() for key, value in tiny_clip(seed=1).state_dict().items()}


def loaded(path, model=None):
    """The weights that a fresh model has after loading a file, and what was said."""
    model = model or tiny_clip(seed=2)
    notes = load_into(model, read(str(path)), "tiny")
    return model.state_dict(), notes


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def inside(weights):
    """As torch.compile of one tower and activation checkpointing name them."""
    return {
        key.replace("visual.", "visual._orig_mod.").replace("resblocks.0.", "resblocks.0._checkpoint_wrapped_module."): value
        for key, value in weights.items()
    }


FORMS = {
    "bare": lambda w: w,
    "ordered": lambda w: collections.OrderedDict(w),
    "half": lambda w: {key: value.half().float() for key, value in w.items()},
    "compiled": lambda w: {"state_dict": prefixed("_orig_mod.", w)},
    "distributed": lambda w: {"epoch": 3, "name": "run", "state_dict": prefixed("module.", w), "optimizer": {"state": {}}},
    "distributed, then compiled": lambda w: prefixed("_orig_mod.module.", w),
    "compiled, then distributed": lambda w: prefixed("module._orig_mod.", w),
    "compiled and checkpointed in part": lambda w: {"state_dict": inside(w)},
    "sharded": lambda w: prefixed("_fsdp_wrapped_module.", w),
    "Lightning": lambda w: {"state_dict": prefixed("model.", w), "pytorch-lightning_version": "2.5", "hyper_parameters": {}},
    "Lightning, compiled": lambda w: {"state_dict": prefixed("model._orig_mod.", w)},
    "Lightning, another word": lambda w: {"state_dict": prefixed("backbone.", w)},
    "Fabric": lambda w: {"model": prefixed("_forward_module.", w)},
    "model": lambda w: {"model": w},
    "model_state_dict": lambda w: {
        "epoch": 1,
        "model_state_dict": w,
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    },
    "DeepSpeed": lambda w: {"module": w, "optimizer": None, "ds_version": "0.15"},
    "deep": lambda w: {"checkpoint": {"model": {"state_dict": prefixed("module.", w)}}},
    "any word": lambda w: {"my_clip": w, "step": 100},
    "in a list": lambda w: (w, {"epoch": 1}),
    "random states": lambda w: {"rng": np.random.get_state(), "torch": torch.get_rng_state(), "state_dict": w},
    "parameters": lambda w: {key: torch.nn.Parameter(value) for key, value in w.items()},
    "numpy scalar": lambda w: {"best": np.float64(0.7), "step": np.int64(3), "state_dict": w},
    "numpy array": lambda w: {"history": np.arange(5.0), "name": np.str_("run"), "state_dict": w},
    "argparse": lambda w: {"args": argparse.Namespace(lr=1e-3, out=pathlib.Path("out")), "model": w},
    "other objects": lambda w: {
        "state_dict": w,
        "seen": {1, 2},
        "when": datetime.datetime(2026, 1, 1),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "path": pathlib.PurePosixPath("a"),
    },
    "scale of length 1": lambda w: w | {"logit_scale": w["logit_scale"].reshape(1)},
    "own text tower": lambda w: {key if key.startswith(("visual", "logit")) else f"text.{key}": v for key, v in w.items()},
    "torch's average": lambda w: {"n_averaged": torch.tensor(10), **prefixed("module.", w)},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_come_out_of_every_form(tmp_path, weights, form):
    torch.save(FORMS[form](weights), tmp_path / "epoch_3.pt")
    state, _ = loaded(tmp_path / "epoch_3.pt")
    for key, value in weights.items():
        assert torch.allclose(state[key], value, atol=1e-3 if form == "half" else 0), key


def test_a_checkpoint_of_torchs_older_format(tmp_path, weights):
    torch.save({"state_dict": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(loaded(tmp_path / "old.pt")[0]["visual.proj"], weights["visual.proj"])


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.bin"])
def test_the_bytes_say_what_a_file_is_and_not_its_name(tmp_path, weights, name):
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / name)
    assert torch.equal(loaded(tmp_path / name)[0]["visual.proj"], weights["visual.proj"])
    torch.save(weights, tmp_path / name)
    assert torch.equal(loaded(tmp_path / name)[0]["visual.proj"], weights["visual.proj"])


@pytest.mark.parametrize(
    "make",
    [torch.jit.script, lambda m: torch.jit.trace(m, (torch.zeros(1, 3, 32, 32), torch.zeros(1, 12).int()), check_trace=False)],
)
def test_the_tensors_of_a_torchscript_archive(tmp_path, make):
    model = tiny_clip(seed=1).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(make(model), tmp_path / "archive.pt")
    state, _ = loaded(tmp_path / "archive.pt")
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize(
    ("form", "taken"),
    [
        (lambda w, e: {"state_dict": w, "state_dict_ema": e}, "weights"),
        (lambda w, e: {"model_ema": e, "model": w}, "weights"),
        (lambda w, e: {"ema": {"shadow": e}, "state_dict": prefixed("module.", w)}, "weights"),
        (lambda w, e: {"state_dict": prefixed("ema_model.", e) | prefixed("model.", w)}, "weights"),
        (lambda w, e: {"ema_state_dict": e, "step": 3}, "mean"),
    ],
)
def test_of_weights_and_their_running_mean_the_weights_are_taken_and_it_is_said(tmp_path, weights, form, taken):
    mean = {key: value + 1 for key, value in weights.items()}
    torch.save(form(weights, mean), tmp_path / "epoch_3.pt")
    state, notes = loaded(tmp_path / "epoch_3.pt")
    assert torch.equal(state["visual.proj"], (weights if taken == "weights" else mean)["visual.proj"])
    assert "ema" in notes[0] and len(notes) <= 2


def test_two_models_under_words_that_nobody_knows_are_refused(tmp_path, weights):
    torch.save({"state_dict": prefixed("student.", weights) | prefixed("teacher.", weights)}, tmp_path / "both.pt")
    with pytest.raises(ModelError, match=r"several models, under 'state_dict.student.', 'state_dict.teacher.'"):
        loaded(tmp_path / "both.pt")


def test_tensors_beside_the_weights_are_left_out_and_said(tmp_path, weights):
    torch.save({"state_dict": prefixed("model.", weights) | {"loss.margin": torch.zeros(1)}}, tmp_path / "last.ckpt")
    state, (note,) = loaded(tmp_path / "last.ckpt")
    assert torch.equal(state["visual.proj"], weights["visual.proj"])
    assert "1 tensors beside the weights are left out: loss.margin" in note


def test_a_logit_bias_makes_a_plain_model_one_with_a_bias(tmp_path, weights):
    torch.save(weights | {"logit_bias": torch.tensor([-10.0])}, tmp_path / "siglip.pt")
    model = tiny_clip(seed=2)
    loaded(tmp_path / "siglip.pt", model)
    assert model.logit_bias.item() == -10.0
    with_bias = tiny_clip(seed=2, init_logit_bias=-3.0)
    torch.save(weights, tmp_path / "softmax.pt")
    loaded(tmp_path / "softmax.pt", with_bias)
    assert with_bias.logit_bias.item() == 0.0


def test_positions_of_another_size_are_interpolated_as_open_clip_does_and_said(tmp_path, weights):
    wider = json.loads(json.dumps(TINY))
    wider["vision_cfg"]["image_size"], wider["text_cfg"]["context_length"] = 64, 20
    torch.save(weights, tmp_path / "small.pt")
    model = tiny_clip(seed=2, **wider)
    _, notes = loaded(tmp_path / "small.pt", model)
    assert sorted(notes) == [
        "positional_embedding has 12 positions, the model 20: interpolated",
        "visual.positional_embedding has 5 positions, the model 17: interpolated",
    ]
