"""Load a model of open_clip from local files."""

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecif import checkpoint as files
from ecif.checkpoint import ModelError
from ecif.towers.split import Towers
from ecif.towers.trained import KEYS, Trained, how_trained

FOLDER = "local-dir:"
CONFIG = "open_clip_config.json"
# Files of weights in a folder, in the order in which open_clip takes them.
IN_FOLDER = ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"]
IN_FOLDER += ["open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"]
IN_FOLDER += ["model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"]


class LoadedModel(NamedTuple):
    """A whole open_clip model, with its heads. Its parameters have open_clip's names."""

    model: nn.Module  # float32, evaluation mode
    tokenizer: Any  # captions -> tokens [B, L]
    preprocess: dict[str, Any]  # open_clip's preprocessing configuration
    architecture: dict[str, Any]  # open_clip's configuration of the model, without paths
    notes: list[str]  # lines about what was taken from the file of weights where that is not obvious


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what open_clip logs, such as a warning that the weights are random before they are loaded."""
    before, nothing = logging.root.manager.disable, logging.NullHandler()
    logging.root.addHandler(nothing)  # or logging's functions install a handler of their own
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(nothing)


class _NotFilled(TorchFunctionMode):
    """Leaves out the random numbers of new weights, which take seconds: a strict load overwrites them all."""

    FILL = {nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_, Tensor.normal_, Tensor.uniform_}
    FILL |= {nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.xavier_normal_, nn.init.xavier_uniform_}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FILL:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load(
    name: str,
    checkpoint: str | None = None,
    pretrained_cfg: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
    named: bool = True,
) -> Towers:
    """Load an open_clip model from local files only, split into trunks and heads.

    Args:
        name: an open_clip architecture, or `local-dir:PATH` of a folder with `open_clip_config.json` and weights.
        checkpoint: path of a file of weights: a state dict of torch or safetensors, also as trainers wrap it, or a TorchScript
            archive. With `local-dir:`, it replaces the weights in the folder.
        pretrained_cfg: the tag of open_clip's tables that says how the weights were trained: their preprocessing and
            activation. `default` is for weights of one's own, trained with open_clip's defaults. A folder says it itself.
        preprocess: parts of open_clip's preprocessing that are known by themselves: `mean`, `std`, `interpolation`,
            `resize_mode`, `fill_color`.
        named: whether to compute the fingerprint, for which all weights are read once more.

    Returns:
        The model. Its `notes` are lines about what was assumed, or taken from the file where that is not obvious.

    Raises:
        ModelError: the name is unknown, the weights do not fit, or how they were trained can't be told. It is a ValueError.
        Exception: of open_clip or transformers, such as a tokenizer that is not on this machine.
    """
    loaded = load_uncut(name, checkpoint, pretrained_cfg, preprocess)
    return Towers(loaded.model, loaded.architecture, loaded.tokenizer, loaded.preprocess, loaded.notes, named)


@_quiet()
def load_uncut(
    name: str, checkpoint: str | None = None, pretrained_cfg: str | None = None, preprocess: Mapping[str, Any] | None = None
) -> LoadedModel:
    """The model of `load` before its heads are cut off; arguments and errors are those of `load`."""
    import open_clip  # takes seconds, which the many processes that only score features are spared

    name, said = full_name(name), dict(preprocess or {})
    file = weights_file(name, checkpoint)
    config = _config(name)
    if unknown := said.keys() - {*KEYS, "size", "mode"}:
        raise ModelError(f"model.preprocess: no such key {sorted(unknown)[0]!r}: there are {', '.join(KEYS)}")
    size = said.pop("size", None)
    said.pop("mode", None)  # RGB, as every model's
    if name.startswith(FOLDER) and pretrained_cfg is not None:
        raise ModelError(f"model.pretrained_cfg: the folder {name.removeprefix(FOLDER)} says itself how it was trained")
    content = files.read(str(file))
    trained, assumed = Trained(said, bool(config.get("quick_gelu"))), list[str]()
    if name.startswith(FOLDER):
        assumed += _of_folder(name, said)
    else:
        tag = pretrained_cfg or ("openai" if content.is_openai and _has_tag(name, "openai") else None)
        trained, assumed = how_trained(name, config, tag, said, content.is_training)
    overwritten = nullcontext() if content.tree is None else _NotFilled()
    with _there(name, config["text_cfg"].get("hf_model_name")), overwritten:
        model = open_clip.create_model(
            name,
            load_weights=False,
            pretrained_text=False,
            force_quick_gelu=trained.quick_gelu,
            force_preprocess_cfg=trained.preprocess,
        )
    notes = [*assumed, *files.load_into(model, content, name.replace(FOLDER, "the model_cfg of "))]
    prepared = open_clip.get_model_preprocess_cfg(model)
    _check_size(size, prepared["size"])
    architecture = config | ({"quick_gelu": True} if trained.quick_gelu else {})
    return LoadedModel(model.eval(), tokenizer(name), prepared, _without_paths(architecture), notes)


@_quiet()
def tokenizer(name: str) -> Any:
    """The tokenizer of a model: captions to tokens [B, L], int64. Arguments and errors are those of `load`."""
    import open_clip

    name = full_name(name)
    with _there(name, _config(name)["text_cfg"].get("hf_tokenizer_name")):
        return open_clip.get_tokenizer(name)


def full_name(name: str) -> str:
    """The name as open_clip lists it: `ViT-B/32` and `ViT-L/14@336px` are OpenAI's spellings. `~` is the home.

    Raises:
        ModelError: there is no such architecture.
    """
    if name.startswith("hf-hub:"):
        raise ModelError(f"model {name!r}: download it first and name the folder with local-dir:PATH")
    if name.startswith(FOLDER):
        return FOLDER + os.path.expanduser(name.removeprefix(FOLDER))
    import open_clip

    known = open_clip.list_models()
    plain = re.sub(r"@(\d+)px$", r"-\1", name.replace("/", "-"))
    if plain in known:
        return plain
    key = {_letters(other): other for other in known}
    near = [key[match] for match in difflib.get_close_matches(_letters(plain), list(key), n=3, cutoff=0.5)]
    advice = f"did you mean {', '.join(near)}?" if near else "open_clip.list_models() lists them"
    raise ModelError(f"open_clip has no architecture {name!r}: {advice}")


def weights_file(name: str, checkpoint: str | None) -> Path:
    """The local file that holds the weights.

    Args:
        name: an architecture, or `local-dir:` with a folder.
        checkpoint: path of a file, or None for the one in the folder.

    Raises:
        ModelError: there is none.
    """
    name = full_name(name)
    if checkpoint is None and not name.startswith(FOLDER):
        raise ModelError(f"model {name!r} needs a checkpoint: give model.checkpoint, or a local-dir: model folder")
    if checkpoint is not None and "://" in checkpoint:
        raise ModelError(
            "the checkpoint is a URL: download it, and give its path; a run's configuration may have the URL itself"
        )
    if checkpoint is not None:
        file = Path(checkpoint).expanduser()
        if file.is_dir():
            raise ModelError(f"model.checkpoint: {file} is a folder: name the file in it, or name: {FOLDER}{file}")
        if not file.exists():
            hint = ""
            if not name.startswith(FOLDER) and _has_tag(name, file.name):
                hint = f"; nothing is downloaded: fetch the weights of {file.name}, and say model.pretrained_cfg: {file.name}"
            raise ModelError(f"model.checkpoint: no file {file}{hint}")
        if not file.is_file():
            raise ModelError(f"model.checkpoint: {file} is no regular file, but a pipe or a device")
        return file
    folder = Path(name.removeprefix(FOLDER)).expanduser()
    if not folder.is_dir():
        raise ModelError(f"model {name!r}: no folder {folder}")
    found = [path for suffix in ("safetensors", "bin", "pth") for path in sorted(folder.glob(f"*.{suffix}"))]
    found.sort(key=lambda path: IN_FOLDER.index(path.name) if path.name in IN_FOLDER else len(IN_FOLDER))
    if not found:
        raise ModelError(f"model {name!r}: no file of weights in {folder} (.safetensors, .bin or .pth)")
    return found[0]


def _config(name: str) -> dict[str, Any]:
    """The model's configuration."""
    if not name.startswith(FOLDER):
        import open_clip

        return open_clip.get_model_config(name)
    file = Path(name.removeprefix(FOLDER)) / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
        config["text_cfg"], config["vision_cfg"]
    except OSError as error:
        raise ModelError(f"model {name!r}: {file} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ModelError(
            f"model {name!r}: {file} is not open_clip's: it needs model_cfg with vision_cfg and text_cfg"
        ) from None
    return config


def _of_folder(name: str, said: dict[str, Any]) -> list[str]:
    """What a folder leaves open about its preprocessing."""
    file = Path(name.removeprefix(FOLDER)) / CONFIG
    if json.loads(file.read_text(encoding="utf-8")).get("preprocess_cfg") or said:
        return []
    return [f"{file} has no preprocess_cfg: images are prepared by open_clip's default; model.preprocess states another"]


def _has_tag(name: str, tag: str) -> bool:
    import open_clip

    return bool(open_clip.get_pretrained_cfg(name, tag))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the paths that the text tower was loaded from."""
    text = {key: value for key, value in config["text_cfg"].items() if key not in ("hf_model_name", "hf_tokenizer_name")}
    return config | {"text_cfg": text}


def _check_size(said: Any, size: Any) -> None:
    pair = lambda value: tuple(value) if isinstance(value, list | tuple) else (value, value)  # noqa: E731
    if said is not None and pair(said) != pair(size):
        raise ModelError(f"model.preprocess.size {said} is not the model's, {size}: leave it out")


@contextmanager
def _there(name: str, of_hugging_face: str | None) -> Iterator[None]:
    """Turn the errors of parts that open_clip takes from Hugging Face, and of what it can't build, into one line."""
    try:
        yield
    except ImportError as error:
        raise ModelError(f"{name} needs a package that is not installed: {error}") from None
    except OSError as error:
        what = of_hugging_face or "its tokenizer"
        advice = "put it into a model folder, or into the cache of Hugging Face on each node"
        raise ModelError(f"{name} needs {what}, which is not on this machine ({type(error).__name__}): {advice}") from None
