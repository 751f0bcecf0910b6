"""Files that are not the model's weights: one line says what they are, what is wrong, and what to do."""

import gzip
import re
import tarfile
import zipfile

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from ecif.checkpoint import ModelError, load_into, read
from tests.support.small_models import tiny_clip


@pytest.fixture(scope="module")
def weights():
    return {key: value.clone() for key, value in tiny_clip(seed=1).state_dict().items()}


def why(path) -> str:
    """The line that refuses a file. It is one line, without control characters, and gives no unsafe advice."""
    with pytest.raises(ModelError) as refused:
        load_into(tiny_clip(seed=2), read(str(path)), "tiny")
    line = str(refused.value)
    assert line.isprintable() and str(path) in line
    assert not re.search(r"weights_only|add_safe_globals|trust the source", line)
    return line


BYTES = {
    "empty": (b"", "is empty: 0 bytes"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605157884\n", "Git LFS pointer.*git lfs pull"),
    "HTML": (b"\n<!DOCTYPE html><html><title>403</title></html>", "page of HTML or XML"),
    "XML": (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "page of HTML or XML"),
    "JSON": (b'{"metadata": {}, "weight_map": {}}', "JSON"),
    "text": (b"Not Found", "no file of weights .text, 9 bytes."),
    "gzip": (gzip.compress(b"weights"), "gzip.*decompress"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "image": (b"\xff\xd8\xff\xe0" + bytes(100), "no file of weights .begins with ff d8 ff e0"),
    "other pickle": (b"\x80\x04}\x94.", "damaged|run"),
}


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_that_holds_no_weights(tmp_path, kind, name):
    data, says = BYTES[kind]
    (tmp_path / name).write_bytes(data)
    assert re.search(says, why(tmp_path / name))


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.9, 0.9999])
def test_a_file_that_is_cut_off(tmp_path, weights, share):
    writers = {
        "new.pt": lambda p: torch.save(weights, p),
        "old.pt": lambda p: torch.save(weights, p, _use_new_zipfile_serialization=False),
        "w.safetensors": lambda p: save_file({k: v.contiguous() for k, v in weights.items()}, p),
    }
    for name, write in writers.items():
        write(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: max(20, int(share * len(data)))])
        assert re.search("cut off|damaged|no file of weights|pickle", why(tmp_path / name)), name


def test_archives_that_are_no_checkpoints(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "zip archive without weights of torch (it holds readme.txt)" in why(tmp_path / "a.pt")
    (tmp_path / "b").write_text("x")
    with tarfile.open(tmp_path / "b.pt", "w") as archive:
        archive.add(tmp_path / "b", "b")
    assert "tar archive" in why(tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", a=np.zeros(3))
    assert "architectures of SigLIP" in why(tmp_path / "c.npz")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_file_is_run_also_beside_good_weights(tmp_path, weights):
    for protocol, content in (
        (2, {"state_dict": Bomb(tmp_path / "ran")}),
        (2, weights | {"x": Bomb(tmp_path / "ran")}),
        (4, weights),
    ):
        torch.save(content, tmp_path / "bomb.pt", pickle_protocol=protocol)
        assert "without running code: save the weights alone" in why(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


def test_a_whole_model_that_was_pickled_is_refused_by_its_class(tmp_path):
    torch.save(tiny_clip(seed=1), tmp_path / "model.pt")
    assert re.search(r"holds objects of .*open_clip\.\w+.* and others", why(tmp_path / "model.pt"))


def test_an_archive_without_a_model(tmp_path):
    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Nothing()), tmp_path / "archive.pt")
    assert "TorchScript archive) holds no tensors with names of tiny" in why(tmp_path / "archive.pt")


def test_missing_unexpected_and_other_shapes_are_named_in_full(tmp_path, weights):
    names = list(weights)
    short = {key: weights[key] for key in names if not key.startswith("visual.transformer")}
    short["visual.proj"] = weights["visual.proj"][:, :-1].clone()
    short |= {"visual.extra": torch.zeros(1)}
    torch.save({"model": short}, tmp_path / "other.pt")
    line = why(tmp_path / "other.pt")
    assert "a checkpoint of torch, under `model.`" in line
    assert "12 missing: visual.transformer.resblocks.0.ln_1.weight, " in line and "and 9 more" in line
    assert "1 unexpected: visual.extra" in line
    assert "1 of another shape: visual.proj [64, 15] instead of [64, 16]" in line


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "Hugging Face transformers"),
        ("text_decoder.text_projection", "coca_"),
        ("visual.transformer.resblocks.0.attn.lora_A", "does not fit"),
    ],
)
def test_weights_of_other_libraries_are_recognised(tmp_path, name, says):
    torch.save({name: torch.zeros(2), "logit_scale": torch.tensor(4.6)}, tmp_path / "foreign.pt")
    assert says in why(tmp_path / "foreign.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path, weights, value):
    bad = weights["visual.proj"].clone()
    bad[3, 2] = value
    torch.save(weights | {"visual.proj": bad}, tmp_path / "nan.pt")
    assert f"1 of {len(weights)} tensors with NaN or infinity: visual.proj" in why(tmp_path / "nan.pt")


@pytest.mark.parametrize(
    ("value", "says"), [(100.0, "makes the logits' scale inf"), (-200.0, "scale 0"), (float("inf"), "NaN or inf")]
)
def test_a_logit_scale_that_gives_no_finite_logits(tmp_path, weights, value, says):
    torch.save(weights | {"logit_scale": torch.tensor(value)}, tmp_path / "scale.pt")
    assert says in why(tmp_path / "scale.pt")


def test_a_download_that_reserved_its_space_and_was_not_finished(tmp_path, weights):
    path = tmp_path / "sparse.safetensors"
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert re.search(rf"\d+ of {len(weights)} tensors with zeros only: ", why(path))


def test_quantised_weights(tmp_path, weights):
    torch.save(weights | {"visual.proj": torch.zeros(64, 16, dtype=torch.int8)}, tmp_path / "int8.pt")
    assert "1 not plain floating-point numbers: visual.proj (int8, strided)" in why(tmp_path / "int8.pt")


def test_a_file_that_may_not_be_read(tmp_path):
    with pytest.raises(ModelError, match="can't be read"):
        read(str(tmp_path))


@pytest.mark.parametrize("name", ["ViT-S-32", "ViT-B-32-256"])
def test_weights_of_another_architecture_name_it(tmp_path, name):
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in open_clip.CLIP(**config).state_dict().items()}
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, tmp_path / "other.pt")
    assert why(tmp_path / "other.pt").endswith(f"these look like weights of {name}")
