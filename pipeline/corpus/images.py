"""Encoded images to the pixels that a model takes. Sizes are checked before anything is decoded.

No torch and no open_clip here, unless resizing is `fast`: the many processes that read would take seconds to import them.
"""

import io
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.corpus.reasons import Refused
from pipeline.corpus.signatures import signature
from pipeline.sections import Embed

MAX_ASPECT = 200  # resizing scales the short side to a few hundred pixels: a thin line would grow to gigabytes
IMAGES = ("JPEG", "PNG", "WebP")  # formats that are read, as `signature` calls them
Pixels = NDArray[np.uint8]


class Resize:
    """A model's own preprocessing of an image, up to the tensor: resized, then cropped or padded at the centre.

    `exact` resizes with Pillow, as open_clip does: `towers.resize_transform` gives the same bytes. `fast` resizes with torch's
    kernel for bytes, which rounds differently.

    Args:
        preprocess: open_clip's preprocessing configuration.
        how: which of them.
    """

    def __init__(self, preprocess: Mapping[str, Any], how: Literal["exact", "fast"] = "exact"):
        size = preprocess["size"]
        self.height, self.width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.mode = preprocess.get("resize_mode") or "shortest"
        self.fill, self.fast = int(preprocess.get("fill_color") or 0), how == "fast"
        # open_clip hands no interpolation on where the model is not square
        always_bicubic = self.mode == "shortest" and self.height != self.width
        self.bilinear = preprocess.get("interpolation") == "bilinear" and not always_bicubic

    def __call__(self, picture: Image.Image | Pixels) -> Pixels:
        """Pixels [H, W, 3] of an RGB image, or of decoded pixels [h, w, 4] whose fourth channel does not matter."""
        height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
        size = self._resized(height, width)
        return self._centred(self._fast(picture, size) if self.fast else self._exact(picture, size))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, with open_clip's roundings."""
        if self.mode == "squash":
            return self.height, self.width
        if self.mode == "shortest" and self.height == self.width:
            long = int(self.height * max(height, width) / min(height, width))
            return (self.height, long) if height <= width else (long, self.height)
        pick = max if self.mode == "longest" else min
        ratio = pick(height / self.height, width / self.width)
        return round(height / ratio), round(width / ratio)

    def _exact(self, picture: Image.Image | Pixels, size: tuple[int, int]) -> Pixels:
        if isinstance(picture, np.ndarray):  # handed over without a copy
            values = pa.Array.from_buffers(pa.uint8(), picture.size, [None, pa.py_buffer(picture)])
            picture = Image.fromarrow(pa.FixedSizeListArray.from_arrays(values, 4), "RGB", picture.shape[1::-1])
        how = Image.Resampling.BILINEAR if self.bilinear else Image.Resampling.BICUBIC
        return np.asarray(picture.resize(size[::-1], how), dtype=np.uint8)

    def _fast(self, picture: Image.Image | Pixels, size: tuple[int, int]) -> Pixels:
        import torch

        pixels = torch.from_numpy(picture if isinstance(picture, np.ndarray) else np.array(picture)).permute(2, 0, 1)[None]
        if pixels.shape[2:] != size:
            how = "bilinear" if self.bilinear else "bicubic"
            pixels = torch.nn.functional.interpolate(pixels, size=size, mode=how, antialias=True)
        return pixels[0, :3].permute(1, 2, 0).numpy()

    def _centred(self, pixels: Pixels) -> Pixels:
        """The model's window of resized pixels."""
        if pixels.shape[0] < self.height or pixels.shape[1] < self.width:
            height, width = pixels.shape[:2]
            padded = np.full((max(height, self.height), max(width, self.width), 3), self.fill, np.uint8)
            top, left = (max(0, self.height - height) // 2, max(0, self.width - width) // 2)
            padded[top : top + height, left : left + width] = pixels
            pixels = padded
        top, left = (round((has - wanted) / 2) for has, wanted in zip(pixels.shape, (self.height, self.width), strict=False))
        return np.ascontiguousarray(pixels[top : top + self.height, left : left + self.width])


def open_image(data: bytes, limits: Embed) -> Image.Image:
    """Open an image by its header. No pixel is decoded. Raises Refused if the image is larger than the limits allow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides below
            image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"])
    except Image.DecompressionBombError as error:
        raise Refused("too_many_pixels", str(error)) from None
    except Exception as error:  # noqa: BLE001  (a decoder may raise anything on hostile input)
        raise _undecodable(data, error) from None
    if image.width * image.height > limits.max_pixels:
        raise Refused("too_many_pixels", f"{image.width} x {image.height}")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise Refused("too_many_pixels", f"{image.width} x {image.height}: resizing multiplies them")
    return image


def read_pixels(data: bytes, limits: Embed, resize: Resize) -> Pixels:
    """The pixels [H, W, 3] of an encoded image. Raises Refused if it can't be used."""
    image = open_image(data, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd files that are decoded all the same
            decoded = decode_jpeg(data, image)
            return resize(image.convert("RGB") if decoded is None else decoded)  # RGB before the resize, as in training
    except Exception as error:  # noqa: BLE001
        raise _undecodable(data, error) from None


def decode_jpeg(data: bytes, image: Image.Image) -> Pixels | None:
    """Decode a JPEG to pixels [h, w, 4], whose first three channels are Pillow's RGB to the bit, in half of Pillow's time.

    Args:
        data: the encoded image.
        image: the same, opened by its header within the limits.

    Returns:
        None if it is anything but a plain, faultless JPEG. Pillow decides about that.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    pixels = np.empty((image.height, image.width, 4), np.uint8)  # more than Pillow saw in the header does not fit
    try:
        decoded = simplejpeg.decode_jpeg(data, "RGBX", buffer=pixels)
    except Exception:  # noqa: BLE001  (whatever it finds, Pillow says it in words that do not change)
        return None
    return decoded if decoded.shape == pixels.shape else None


def _undecodable(data: bytes, error: Exception) -> Refused:
    """The reason why a decoder gave up: it is no image that is read, its end is missing, or something else is wrong."""
    kind = signature(data)
    if kind not in IMAGES:
        return Refused("undecodable_image", f"{kind}, not {', '.join(IMAGES[:-1])} or {IMAGES[-1]}")
    if kind == "JPEG":
        whole = b"\xff\xd9" in data[max(0, data.rfind(b"\xff\xda")) :]  # JPEG: an end after the last scan's start
    elif kind == "PNG":
        whole = b"IEND" in data
    else:
        whole = 8 + int.from_bytes(data[4:8], "little") <= len(data)
    # Errors of decoders are of their own making. One that shows an object shows its address, another one in each run.
    text = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))
    return Refused("undecodable_image" if whole else "truncated_image", f"{kind}: {type(error).__name__}: {text}")
