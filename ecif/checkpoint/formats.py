"""What a file is, by its bytes and not its name, and the tensors in it.

Nothing in a file is executed. Files of torch are read by torch's weights-only reader. Objects of the classes below, which
trainers keep beside the weights, become empty stand-ins there: their classes are not imported. A file that names any other
class is refused. Of a TorchScript archive the tensors are read, and not its code.
"""

import io
import json
import os
import warnings
import zipfile
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ecif.checkpoint.error import ModelError

MAX_HEADER = 100_000_000  # bytes of a safetensors header, the format's own limit
SAVE_WEIGHTS = "save the weights alone where it was trained: torch.save(model.state_dict(), PATH)"

# First bytes of files that hold no weights, what such a file is, and what to do.
NO_WEIGHTS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the weights", "fetch them with `git lfs pull`"),
    b"<": ("a page of HTML or XML, such as a login or an error", "download the file itself again"),
    b"{": ("JSON, such as an index or a configuration", "name the file that holds the tensors"),
    b"\x1f\x8b": ("compressed by gzip", "decompress it first"),
    b"BZh": ("compressed by bzip2", "decompress it first"),
    b"\xfd7zXZ": ("compressed by xz", "decompress it first"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "decompress it first"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
    b"\x89HDF": ("HDF5, as Keras writes it", "convert it to a state dict of open_clip's names"),
    b"GGUF": ("GGUF, quantised for inference", "use the weights that it was made from"),
    b"\x93NUMPY": ("one numpy array", "name a .pt or .safetensors state dict"),
}


class StandIn:
    """Takes the place of an object beside the weights. It keeps the object's state and does nothing."""

    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        """Take any arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Keep the state as it is."""
        self.state = state


def _empty_dict(*args: Any) -> dict[Any, Any]:
    return {}


# The classes that a file may name beside those that torch itself allows, and what stands in for them.
NUMPY = [f"{core}.multiarray.{name}" for core in ("numpy.core", "numpy._core") for name in ("scalar", "_reconstruct")]
DTYPES = ("Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64", "Float16", "Float32", "Float64")
ALLOWED: dict[str, Any] = {
    **dict.fromkeys([*NUMPY, "numpy.dtype", "numpy.ndarray", *(f"numpy.dtypes.{t}DType" for t in (*DTYPES, "Str"))], StandIn),
    **dict.fromkeys(["numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"], StandIn),
    **dict.fromkeys([f"numpy.{t.lower()}" for t in (*DTYPES, "Bool_")], StandIn),
    **dict.fromkeys(["argparse.Namespace", "types.SimpleNamespace", "typing.Any"], StandIn),
    **dict.fromkeys([f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath")], StandIn),
    **dict.fromkeys([f"pathlib._local.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")], StandIn),
    **dict.fromkeys([f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")], StandIn),
    **dict.fromkeys([f"builtins.{name}" for name in ("list", "dict", "int", "float", "str", "bool", "tuple")], StandIn),
    **dict.fromkeys(["builtins.slice", "builtins.range", "builtins.frozenset", "uuid.UUID", "decimal.Decimal"], StandIn),
    **dict.fromkeys([f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")], StandIn),
    **dict.fromkeys([f"omegaconf.nodes.{t}Node" for t in ("Any", "String", "Integer", "Float", "Boolean", "Path")], StandIn),
    **dict.fromkeys(["omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"], StandIn),
    "torch.torch_version.TorchVersion": StandIn,
    "collections.defaultdict": _empty_dict,
    **dict.fromkeys(["lightning.fabric.utilities.data.AttributeDict", "lightning_fabric.utilities.data.AttributeDict"], dict),
    **dict.fromkeys(["pytorch_lightning.utilities.parsing.AttributeDict", "addict.addict.Dict", "yacs.config.CfgNode"], dict),
}
OPENAI = {"input_resolution", "context_length", "vocab_size"}  # what OpenAI's archives hold beside the weights


class Content(NamedTuple):
    """What a file holds."""

    path: str
    kind: str  # for people
    tree: Any  # nested dictionaries with tensors
    all_are_weights: bool = True  # False for an archive, which holds other tensors under the same names as weights

    @property
    def is_training(self) -> bool:
        """Whether this is a checkpoint to go on training from. Such files are not published: the weights are one's own."""
        return isinstance(self.tree, dict) and any(str(key).startswith("optimizer") for key in self.tree)

    @property
    def is_openai(self) -> bool:
        """Whether this is an archive that OpenAI published. Their models have QuickGELU."""
        return not self.all_are_weights and self.tree.keys() >= OPENAI


def read(path: str) -> Content:
    """Read a file of weights.

    Raises:
        ModelError: the file is no file of weights, is damaged, or can't be read without running code.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from None
    if not size:
        raise ModelError(f"{path} is empty: 0 bytes; fetch it again")
    if start.startswith(b"PK"):
        return _archive(path)
    if start.startswith(b"\x80"):
        return _of_torch(path)
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 2 <= header <= MAX_HEADER:
        return Content(path, "safetensors", _safetensors(path, size, header))
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for first, (what, advice) in NO_WEIGHTS.items():
        if text.startswith(first):
            raise ModelError(f"{path} is {what} ({size} bytes): {advice}")
    if start[257:262] == b"ustar":
        raise ModelError(f"{path} is a tar archive: unpack it, and name the file of weights in it")
    what = "text" if text and all(byte >= 32 or byte in b"\t\r\n\f" for byte in text) else f"begins with {start[:8].hex(' ')}"
    raise ModelError(f"{path} is no file of weights ({what}, {size} bytes): name a .pt or .safetensors state dict")


def _archive(path: str) -> Content:
    """A zip: a checkpoint of torch, TorchScript, or numpy's arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        size = os.path.getsize(path)
        raise ModelError(f"{path} is cut off or damaged: a zip without its end ({size} bytes); fetch it again") from None
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside:
        return Content(path, "a TorchScript archive", _torchscript(path), all_are_weights=False)
    if "data.pkl" in inside:
        return _of_torch(path)
    if names and all(name.endswith(".npy") for name in names):
        return Content(path, "arrays of numpy, as big_vision writes them", None)
    listed = ", ".join(names[:3]) or "nothing"
    raise ModelError(f"{path} is a zip archive without weights of torch (it holds {listed}): unpack it, and name the file")


def _of_torch(path: str) -> Content:
    with open(path, "rb") as file:
        return Content(path, "a checkpoint of torch", _torch(path, file))


def _torch(path: str, file: BinaryIO) -> Any:
    """What torch saved. It goes by the name of a file that it opens itself, so it gets one that is open."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(to, name) for name, to in ALLOWED.items()]):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (a damaged file ends in any of them; none of their texts is for our user)
        if refused := _refused(file):
            some = f"{', '.join(refused[:3])}{' and others' if len(refused) > 3 else ''}"
            raise ModelError(
                f"{path} holds objects of {some}, which can't be read without running code: {SAVE_WEIGHTS}"
            ) from None
        if "magic number" in str(error):
            raise ModelError(f"{path} is a Python pickle that torch.save did not write: {SAVE_WEIGHTS}") from None
        if type(error).__name__ == "UnpicklingError":
            raise ModelError(f"{path} holds objects that can't be read without running code: {SAVE_WEIGHTS}") from None
        raise ModelError(f"{path} is cut off or damaged ({os.path.getsize(path)} bytes): fetch or save it again") from None


def _refused(file: BinaryIO) -> list[str]:
    """Names of the classes in a file that are not allowed; empty where they can't be told."""
    try:
        file.seek(0)
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # noqa: BLE001  (of a damaged file, or an older format)
        return []
    return sorted(set(unsafe) - ALLOWED.keys())


def _torchscript(path: str) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive, by name.

    Without its code and constants the archive is one of torch, whose modules are objects with a state. They become stand-ins.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(buffer, "w") as tensors:
        for item in archive.infolist():
            inside = item.filename.partition("/")[2]
            if inside != "constants.pkl" and not inside.startswith(("code/", "constants/")):
                tensors.writestr(item.filename, archive.read(item))
    try:
        buffer.seek(0)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
        modules: list[Any] = [(StandIn, name) for name in named if name.startswith(("__torch__.", "torch.jit._pickle."))]
        buffer.seek(0)
        with torch.serialization.safe_globals(modules):
            root = _torch(path, buffer)
    except ModelError:
        raise
    except Exception:  # noqa: BLE001  (an archive of a torch before ours, or a damaged one)
        raise ModelError(
            f"{path} is a TorchScript archive whose tensors can't be read without running its code: convert it where you "
            "trust it: torch.save(torch.jit.load(PATH).state_dict(), OUT)"
        ) from None
    return dict(_named_tensors(root, ""))


def _named_tensors(module: Any, prefix: str) -> list[tuple[str, Tensor]]:
    """The tensors of a module and of the modules in it."""
    if isinstance(module, Tensor):
        return [(prefix.removesuffix("."), module.detach())]
    state = module.state if isinstance(module, StandIn) else None
    return (
        [pair for name, value in (state or {}).items() for pair in _named_tensors(value, f"{prefix}{name}.")]
        if isinstance(state, dict)
        else []
    )


def _safetensors(path: str, size: int, header: int) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file:
            entries = json.loads(file.read(8 + header)[8:])
        whole = 8 + header + max([0, *(entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__")])
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = 8 + header if size < 8 + header else 0
    if size < whole:
        raise ModelError(f"{path} is cut off: {size} bytes of safetensors, of at least {whole}; fetch it again")
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception:  # noqa: BLE001  (its texts are about the format)
        raise ModelError(f"{path} is damaged: safetensors that can't be read ({size} bytes); fetch or save it again") from None
